r"""Simple detectors on frozen features, which a flow has to beat: Gaussians, PaDiM, nearest neighbours.

Each takes levels of features, finest first: a list of tensors (N, C, H, W) in float32. `fit` takes those of
normal images; `score` gives one number per image and variant, and an anomaly map where there is one. All run
on the threads that torch is given.

    python benchmarks/baselines.py --data quality/data --work quality --stages blocks.2 blocks.4
    python benchmarks/baselines.py --data quality/data --work quality \
        --stages blocks.2 blocks.4 blocks.5 --scales 2

The second takes the features of csflow's default. A line of `baselines.jsonl` is written for each data set,
seed, detector and variant of its score; a run continues where it was stopped, and `quality.py table` reads
them. Seeds decide the split as the training job's do, and what a detector draws.
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from quality_data import add_run_arguments, prepare, test_images
from quality_features import cached_images, read_levels
from quality_figures import image_figures, pixel_figures
from torch import Tensor
from torch.nn import functional as F

from csflow import process
from csflow.training.config import TrainConfig

# N images, C channels, H, W rows and columns of a level, P = H · W positions, M patches of a memory bank.

Levels = Sequence[Tensor]
TOP_SHARE = 0.03
"""Of a map's cells, the hottest, whose mean is the `top` variant of a score."""


class Scored(NamedTuple):
    scores: dict[str, Tensor]
    """By variant: float64 (N)."""
    map_NHW: Tensor | None
    """Float32, not negative; the same for all variants."""


class Baseline(Protocol):
    def fit(self, levels: Levels) -> None: ...

    def score(self, levels: Levels) -> Scored: ...


class PooledGaussian:
    """Mahalanobis distance of each level's mean over positions, concatenated; Ledoit-Wolf covariance."""

    def fit(self, levels: Levels) -> None:
        pooled_NC = self._pooled(levels)
        self.mean_C = pooled_NC.mean(0)
        self.inverse_CC = torch.linalg.inv(ledoit_wolf(pooled_NC - self.mean_C))

    def score(self, levels: Levels) -> Scored:
        off_NC = self._pooled(levels) - self.mean_C
        squares_N = ((off_NC @ self.inverse_CC) * off_NC).sum(1)
        return Scored({"mean": squares_N / off_NC.shape[1] / 2}, None)

    @staticmethod
    def _pooled(levels: Levels) -> Tensor:
        return torch.cat([level.mean((2, 3), dtype=torch.float64) for level in levels], 1)


class Gaussian:
    """A Gaussian per level: one covariance for all positions, with one mean or a mean per position.

    It is what a flow is that only whitens: z = L⁻¹ (y - μ), with L Lᵀ the covariance. `loss` is in the unit
    of the flow's: (|z|² / 2 - log |det L⁻¹|) per dimension.
    """

    def __init__(self, mean_per_position: bool, ridge: float = 1e-4) -> None:
        """Args:
        ridge: share of the mean variance in the covariance's place, so that it can be inverted.
        """
        self.mean_per_position = mean_per_position
        self.ridge = ridge

    def fit(self, levels: Levels) -> None:
        over = (0,) if self.mean_per_position else (0, 2, 3)
        self.means, self.factors = [], []
        for level in levels:
            mean_CHW = level.mean(over, keepdim=True, dtype=torch.float64).float()
            channels = level.shape[1]
            scatter_CC = torch.zeros(channels, channels, dtype=torch.float64)
            for part in level.split(64):
                rows_RC = (part - mean_CHW).movedim(1, -1).reshape(-1, channels)
                scatter_CC += (rows_RC.T @ rows_RC).double()
            covariance_CC = scatter_CC / (level.numel() / channels)
            self.means.append(mean_CHW)
            self.factors.append(torch.linalg.cholesky(shrunk(covariance_CC, self.ridge)))

    def score(self, levels: Levels) -> Scored:
        squares = [
            whitened_squares(level, mean, factor)
            for level, mean, factor in zip(levels, self.means, self.factors, strict=True)
        ]
        return scores_of_squares(squares, levels)

    def loss(self, levels: Levels) -> float:
        """Negative log-likelihood per dimension, less its constant: in the unit of the flow's loss."""
        total, dimensions = 0.0, 0
        for level, mean, factor in zip(levels, self.means, self.factors, strict=True):
            positions = level.shape[2] * level.shape[3]
            total += float(whitened_squares(level, mean, factor).double().sum((1, 2)).mean()) / 2
            total += positions * float(factor.diagonal().log().sum())
            dimensions += positions * level.shape[1]
        return total / dimensions


class PositionGaussian:
    """A mean and a covariance per position and level, the covariance drawn towards that of all positions.

    `weight` of the latter is the one with the best likelihood of validation images; 1 is `Gaussian` with a
    mean per position.
    """

    WEIGHTS = (1.0, 0.9, 0.7, 0.5, 0.35, 0.25, 0.15, 0.1, 0.05, 0.02)

    def __init__(self, validation: Levels) -> None:
        self.validation = validation

    def fit(self, levels: Levels) -> None:
        self.means = [level.mean(0, keepdim=True, dtype=torch.float64).float() for level in levels]
        self.weights, self.factors = [], []
        for level, mean, validation in zip(levels, self.means, self.validation, strict=True):
            own_PCC = position_covariances(level - mean)
            common_CC = shrunk(own_PCC.mean(0, dtype=torch.float64), 1e-4).float()
            losses = {}
            for weight in self.WEIGHTS:
                factor_PCC = torch.linalg.cholesky(torch.lerp(own_PCC, common_CC, weight))
                losses[weight] = self._level_loss(validation - mean, factor_PCC)
            self.weights.append(min(losses, key=losses.__getitem__))
            mixed_PCC = torch.lerp(own_PCC, common_CC, self.weights[-1])
            self.factors.append(torch.linalg.cholesky(mixed_PCC))

    def score(self, levels: Levels) -> Scored:
        squares = [
            position_squares(level - mean, factor)
            for level, mean, factor in zip(levels, self.means, self.factors, strict=True)
        ]
        return scores_of_squares(squares, levels)

    def loss(self, levels: Levels) -> float:
        """See `Gaussian.loss`."""
        sizes = [level[0].numel() for level in levels]
        losses = [
            self._level_loss(level - mean, factor)
            for level, mean, factor in zip(levels, self.means, self.factors, strict=True)
        ]
        return sum(size * loss for size, loss in zip(sizes, losses, strict=True)) / sum(sizes)

    @staticmethod
    def _level_loss(off_NCHW: Tensor, factor_PCC: Tensor) -> float:
        squares = float(position_squares(off_NCHW, factor_PCC).double().sum((1, 2)).mean()) / 2
        log_det = float(factor_PCC.diagonal(dim1=1, dim2=2).double().log().sum())
        return (squares + log_det) / off_NCHW[0].numel()


class Padim:
    """PaDiM (Defard et al., ICPR 2020): a Gaussian per position on random channels of all levels.

    `max` is the paper's score. The map is the distance, blurred by 4 pixels of an image of 256.
    """

    def __init__(self, seed: int, channels: int = 100) -> None:
        self.seed = seed
        self.channels = channels

    def fit(self, levels: Levels) -> None:
        channels = sum(level.shape[1] for level in levels)
        generator = torch.Generator().manual_seed(self.seed)
        self.chosen = torch.randperm(channels, generator=generator)[: self.channels]
        features = self._features(levels)
        self.mean = features.mean(0, keepdim=True)
        covariance_PCC = position_covariances(features - self.mean)
        covariance_PCC += 0.01 * torch.eye(covariance_PCC.shape[1])
        self.factor_PCC = torch.linalg.cholesky(covariance_PCC)

    def score(self, levels: Levels) -> Scored:
        squares_NHW = position_squares(self._features(levels) - self.mean, self.factor_PCC)
        map_NHW = blurred(squares_NHW.sqrt())
        return Scored({"mean": _mean(squares_NHW) / 2, "top": top(map_NHW), "max": _max(map_NHW)}, map_NHW)

    def _features(self, levels: Levels) -> Tensor:
        size = levels[0].shape[2:]
        return torch.cat([F.interpolate(level, size) for level in levels], 1)[:, self.chosen]


class NearestNeighbours:
    """As PatchCore (Roth et al., CVPR 2022): distance to the nearest of a coreset of normal patches.

    A patch is the mean of 3 x 3 positions of each level, coarse levels enlarged to the finest one. The
    coreset has `share` of all patches. It is chosen greedily, by distances in a random projection, from at
    most `candidates` random ones, or as many as it is to have. `reweighted`
    is the paper's score, `max` the same without its weight.
    """

    def __init__(self, seed: int, share: float = 0.01, candidates: int = 60_000) -> None:
        self.seed = seed
        self.share = share
        self.candidates = candidates

    def fit(self, levels: Levels) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        positions = levels[0].shape[2] * levels[0].shape[3]
        patches = len(levels[0]) * positions
        wanted = max(1, round(self.share * patches))
        drawn = torch.randperm(patches, generator=generator)[: max(wanted, self.candidates)].sort().values
        found = []
        for start in range(0, len(levels[0]), 64):
            part_PC = self._patches([level[start : start + 64] for level in levels]).flatten(0, 1)
            first = start * positions
            found.append(part_PC[drawn[(drawn >= first) & (drawn < first + len(part_PC))] - first])
        candidates = torch.cat(found)
        self.bank_MC = candidates[greedy_coreset(candidates, wanted, generator)]

    def score(self, levels: Levels) -> Scored:
        maps, scores = [], {"max": [], "reweighted": []}
        for start in range(0, len(levels[0]), 16):
            patches_NPC = self._patches([level[start : start + 16] for level in levels])
            distance_NP, nearest_NP = self._nearest(patches_NPC)
            highest_N, place_N = distance_NP.max(1)
            rows = torch.arange(len(place_N))
            weight_N = self._weight(patches_NPC[rows, place_N], nearest_NP[rows, place_N], highest_N)
            scores["max"].append(highest_N.double())
            scores["reweighted"].append((weight_N * highest_N).double())
            maps.append(distance_NP.reshape(len(place_N), *levels[0].shape[2:]))
        map_NHW = blurred(torch.cat(maps))
        return Scored({name: torch.cat(parts) for name, parts in scores.items()}, map_NHW)

    def _nearest(self, patches_NPC: Tensor) -> tuple[Tensor, Tensor]:
        flat_RC = patches_NPC.flatten(0, 1)
        products_RM = (self.bank_MC.square().sum(1) / 2).neg() + flat_RC @ self.bank_MC.T
        best_R, nearest_R = products_RM.max(1)
        squares_R = (flat_RC.square().sum(1) - 2 * best_R).clamp_min(0)
        shape = patches_NPC.shape[:2]
        return squares_R.sqrt().reshape(shape), nearest_R.reshape(shape)

    def _weight(self, patch_NC: Tensor, nearest_N: Tensor, distance_N: Tensor, neighbours: int = 9) -> Tensor:
        """Equation 7: the score counts more where the nearest normal patch is itself a rare one."""
        nearest_NC = self.bank_MC[nearest_N]
        count = min(neighbours, len(self.bank_MC))
        around = torch.cdist(nearest_NC, self.bank_MC).topk(count, largest=False).indices
        distances = torch.linalg.vector_norm(self.bank_MC[around] - patch_NC[:, None], dim=2)
        scale = math.sqrt(patch_NC.shape[1])
        return 1 - (distance_N / scale).exp() / (distances / scale).exp().sum(1)

    @staticmethod
    def _patches(levels: Levels) -> Tensor:
        """(N, P, C)."""
        size = tuple(levels[0].shape[2:])
        # With zeros around, as the paper: means of fewer positions at the border would be the farthest ones.
        means = [F.avg_pool2d(level, 3, stride=1, padding=1) for level in levels]
        large = [F.interpolate(m, size, mode="bilinear", align_corners=False) for m in means]
        return torch.cat(large, 1).flatten(2).transpose(1, 2).contiguous()


def greedy_coreset(rows_RC: Tensor, wanted: int, generator: torch.Generator, projected: int = 32) -> Tensor:
    """Indices of rows that leave no other row far away: each next one is the farthest from those before."""
    projection = torch.randn(rows_RC.shape[1], projected, generator=generator) / math.sqrt(projected)
    rows = rows_RC @ projection
    half_squares_R = rows.square().sum(1) / 2
    # |a - b|² / 2 = |a|² / 2 + |b|² / 2 - a·b, with one product of a matrix and a vector per choice.
    chosen = [int(torch.randint(len(rows), (1,), generator=generator))]
    distance_R = torch.full((len(rows),), math.inf)
    while len(chosen) < wanted:
        last = chosen[-1]
        new_R = torch.addmv(half_squares_R, rows, rows[last], alpha=-1).add_(half_squares_R[last])
        torch.minimum(distance_R, new_R, out=distance_R)
        chosen.append(int(distance_R.argmax()))
    return torch.tensor(chosen)


def ledoit_wolf(centred_NC: Tensor) -> Tensor:
    """Covariance of float64 rows of mean 0, shrunk towards a multiple of the identity (Ledoit, Wolf 2004)."""
    rows, channels = centred_NC.shape
    covariance_CC = centred_NC.T @ centred_NC / rows
    scale = covariance_CC.diagonal().mean()
    identity_CC = scale * torch.eye(channels, dtype=covariance_CC.dtype)
    far = (covariance_CC - identity_CC).square().sum()
    noise = ((centred_NC.square().sum(1).square().sum() / rows) - covariance_CC.square().sum()) / rows
    return torch.lerp(covariance_CC, identity_CC, (noise / far).clamp(0, 1))


def shrunk(covariance_CC: Tensor, ridge: float) -> Tensor:
    identity = torch.eye(len(covariance_CC), dtype=covariance_CC.dtype)
    return torch.lerp(covariance_CC, covariance_CC.diagonal().mean() * identity, ridge)


def position_covariances(off_NCHW: Tensor) -> Tensor:
    """Covariance (P, C, C) of each position, of features less their means."""
    rows_PNC = off_NCHW.flatten(2).permute(2, 0, 1)
    images, channels = rows_PNC.shape[1:]
    out_PCC = torch.empty(len(rows_PNC), channels, channels)
    for part, out in zip(rows_PNC.split(32), out_PCC.split(32), strict=True):
        torch.bmm(part.transpose(1, 2), part, out=out)
    return out_PCC.div_(images)


def position_squares(off_NCHW: Tensor, factor_PCC: Tensor) -> Tensor:
    """|L⁻¹ (y - μ)|² (N, H, W), with a factor L per position."""
    columns_PCN = off_NCHW.flatten(2).permute(2, 1, 0)
    squares_PN = torch.cat(
        [
            torch.linalg.solve_triangular(factor, column, upper=False).square().sum(1)
            for factor, column in zip(factor_PCC.split(64), columns_PCN.split(64), strict=True)
        ]
    )
    return squares_PN.T.reshape(len(off_NCHW), *off_NCHW.shape[2:])


def whitened_squares(level: Tensor, mean: Tensor, factor_CC: Tensor) -> Tensor:
    """|L⁻¹ (y - μ)|² (N, H, W), with one factor L."""
    identity = torch.eye(len(factor_CC), dtype=factor_CC.dtype)
    whitening = torch.linalg.solve_triangular(factor_CC, identity, upper=False).float()
    parts = [F.conv2d(part - mean, whitening[:, :, None, None]) for part in level.split(64)]
    return torch.cat([part.square().sum(1) for part in parts])


def scores_of_squares(squares: Levels, levels: Levels) -> Scored:
    """Mean of z² / 2 over all dimensions, and the hottest places of the summed map.

    In the sum each level counts as much as any other: as the mean of its z² over channels.
    """
    dimensions = sum(level[0].numel() for level in levels)
    mean_N = sum(square.double().sum((1, 2)) for square in squares) / dimensions / 2
    size = tuple(levels[0].shape[2:])
    maps = [
        F.interpolate((s / level.shape[1])[:, None], size, mode="bilinear", align_corners=False)[:, 0]
        for s, level in zip(squares, levels, strict=True)
    ]
    map_NHW = sum(maps[1:], maps[0])
    return Scored({"mean": mean_N, "top": top(map_NHW), "max": _max(map_NHW)}, map_NHW)


def top(map_NHW: Tensor, share: float = TOP_SHARE) -> Tensor:
    """Mean of the hottest share of each map's cells, float64 (N)."""
    cells_NP = map_NHW.flatten(1)
    return cells_NP.topk(max(1, round(share * cells_NP.shape[1])), dim=1).values.double().mean(1)


def blurred(map_NHW: Tensor) -> Tensor:
    """With a standard deviation of 1/64 of the side, which is 4 pixels of an image of 256."""
    sigma = map_NHW.shape[2] / 64
    reach = max(1, math.ceil(3 * sigma))
    kernel = torch.exp(-((torch.arange(-reach, reach + 1) / sigma) ** 2) / 2)
    kernel = kernel / kernel.sum()
    padded = F.pad(map_NHW[:, None], (reach, reach, reach, reach), mode="reflect")
    return F.conv2d(F.conv2d(padded, kernel.view(1, 1, 1, -1)), kernel.view(1, 1, -1, 1))[:, 0]


def _mean(map_NHW: Tensor) -> Tensor:
    return map_NHW.double().mean((1, 2))


def _max(map_NHW: Tensor) -> Tensor:
    return map_NHW.amax((1, 2)).double()


class Parts(NamedTuple):
    """Features of a data set, divided as the training job divides its images."""

    training: Levels
    validation: Levels
    heldout: Levels
    test: Levels


def _detectors(seed: int, parts: Parts) -> Iterator[tuple[str, Baseline]]:
    yield "pooled Gaussian", PooledGaussian()
    yield "global Gaussian", Gaussian(mean_per_position=False)
    yield "Gaussian, mean per position", Gaussian(mean_per_position=True)
    yield "Gaussian per position", PositionGaussian(parts.validation)
    yield "PaDiM", Padim(seed)
    yield "nearest neighbours", NearestNeighbours(seed)


def _load(folder: Path, seed: int, stages: Sequence[str], scales: int, features: Path) -> Parts:
    config = TrainConfig(
        input=[str(folder)], output="unused", cut_after=list(stages), scales=scales, seed=seed
    )
    cache, data, test = cached_images(config, folder, features)
    parts = {name: read_levels(cache, data.subset(name)) for name in ("training", "validation", "heldout")}
    return Parts(**parts, test=read_levels(cache, test))


def run(arguments: argparse.Namespace) -> None:
    process.set_up(arguments.threads, gpus=0)
    results: Path = arguments.work / "baselines.jsonl"
    results.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    done = {(line["data"], line["seed"], line["features"], line["detector"]) for line in lines}
    features = f"{' + '.join(arguments.stages)}, {arguments.scales} scale{'s' * (arguments.scales > 1)}"
    for name in arguments.names:
        folder = prepare(name, arguments.data)
        for seed in arguments.seeds:
            parts = _load(folder, seed, arguments.stages, arguments.scales, arguments.work / "features")
            for detector, baseline in _detectors(seed, parts):
                key = {"data": name, "seed": seed, "features": features, "detector": detector}
                if tuple(key.values()) in done or detector not in arguments.detectors:
                    continue
                for line in _measured(baseline, parts, folder):
                    with results.open("a") as file:
                        file.write(json.dumps(key | line) + "\n")
                    print(json.dumps(key | line), flush=True)


def _measured(baseline: Baseline, parts: Parts, folder: Path) -> Iterator[dict[str, Any]]:
    """A line for each variant of the score."""
    fit_seconds = _cpu_seconds(lambda: baseline.fit(parts.training))
    heldout = baseline.score(parts.heldout)
    started = time.process_time()
    scored = baseline.score(parts.test)
    score_seconds = time.process_time() - started
    tested = test_images(folder)
    losses = {}
    if isinstance(baseline, Gaussian | PositionGaussian):
        losses = {"validation_loss": baseline.loss(parts.validation)}
    pixels = {}
    if scored.map_NHW is not None:
        pixels = pixel_figures(scored.map_NHW.numpy(), tested)
    for variant, scores in scored.scores.items():
        figures = image_figures(scores.numpy(), heldout.scores[variant].numpy(), tested)
        seconds = {"train_cpu_seconds": fit_seconds, "score_cpu_seconds": score_seconds}
        yield {"variant": variant} | figures | pixels | losses | seconds


def _cpu_seconds(do: Callable[[], None]) -> float:
    started = time.process_time()
    do()
    return time.process_time() - started


DETECTORS = (
    "pooled Gaussian",
    "global Gaussian",
    "Gaussian, mean per position",
    "Gaussian per position",
    "PaDiM",
    "nearest neighbours",
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="folder of features and results")
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--stages", nargs="+", required=True, help="of the backbone, finest first")
    parser.add_argument("--scales", type=int, default=1, help="of the image")
    parser.add_argument("--detectors", nargs="+", default=DETECTORS, choices=DETECTORS)
    add_run_arguments(parser)
    run(parser.parse_args())


if __name__ == "__main__":
    main()
