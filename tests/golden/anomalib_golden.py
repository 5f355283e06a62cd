"""Prints what anomalib 2.7.0's Csflow computes, for tests/test_import.py. Run in an environment of its own:

    pip install anomalib==2.7.0
    python tests/golden/anomalib_golden.py

Writes beside itself `anomalib_2.7.0.ckpt.gz`, a Lightning checkpoint of two coupling blocks as
`Trainer.save_checkpoint` makes it, without the 120 MB of its feature extractor, and `anomalib_2.7.0.json`,
the results for `features()`, and scores of `extractors.images()` with weights of the feature extractor from
`extractors.weights`. The flow's are drawn from a few values each, so that the file can be compressed.
"""

import gzip
import io
import json
from pathlib import Path

import anomalib.models.image.csflow.torch_model as csflow_model
import extractors
import numpy as np
import torch
from anomalib.models import Csflow
from lightning.pytorch import Trainer

FOLDER = Path(__file__).parent


def features() -> list[torch.Tensor]:
    """Two samples of three scales, by a formula that is exact in float32 everywhere."""
    shapes = [(2, 304, 8 >> s, 8 >> s) for s in range(3)]
    return [
        torch.from_numpy(
            ((np.arange(np.prod(shape)) * 7919 + s) % 257 - 128).astype(np.float32) / 64
        ).reshape(shape)
        for s, shape in enumerate(shapes)
    ]


def new_model() -> Csflow:
    published = csflow_model.efficientnet_b5
    csflow_model.efficientnet_b5 = lambda weights: published()  # it is left out: no download
    model = Csflow(cross_conv_hidden_channels=1, n_coupling_blocks=2)
    random = np.random.default_rng(0)
    for name, value in model.model.graph.named_parameters():
        if "gamma" in name:
            levels = random.integers(4, 17, value.shape) / 16
        else:
            levels = random.integers(-7, 8, value.shape) / 128
        value.data = torch.from_numpy(levels.astype(np.float32))
    return model.eval()


def write_checkpoint(model: Csflow) -> None:
    trainer = Trainer(logger=False, enable_checkpointing=False, accelerator="cpu", max_epochs=0)
    trainer.strategy.connect(model)
    trainer.save_checkpoint(FOLDER / "whole.ckpt")
    checkpoint = torch.load(FOLDER / "whole.ckpt", weights_only=True)
    state = checkpoint["state_dict"]
    checkpoint["state_dict"] = {k: v for k, v in state.items() if "feature_extractor" not in k}
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    (FOLDER / "anomalib_2.7.0.ckpt.gz").write_bytes(gzip.compress(buffer.getvalue(), mtime=0))
    (FOLDER / "whole.ckpt").unlink()


@torch.no_grad()
def results(model: Csflow) -> dict[str, object]:
    z, log_det = model.model.graph(features())
    return {
        "score": model.model._compute_anomaly_scores(z).tolist(),
        "log_det_sum": log_det[0].item(),  # over the batch, once per sample
        "map": z[0].square().mean(1).tolist(),
    }


@torch.no_grad()
def whole_scores(model: Csflow) -> list[float]:
    size = (extractors.SIDE, extractors.SIDE)
    whole = csflow_model.CsFlowModel(size, cross_conv_hidden_channels=1, n_coupling_blocks=2).eval()
    whole.graph.load_state_dict(model.model.graph.state_dict())
    # The extractor holds its network twice, as it was and cut.
    state = whole.feature_extractor.state_dict()
    for prefix in sorted({name.partition("features.")[0] for name in state}):
        own = {name: value for name, value in state.items() if name.startswith(f"{prefix}features.")}
        state |= extractors.weights(own)
    whole.feature_extractor.load_state_dict(state)
    transform = Csflow.configure_pre_processor(size).transform
    image_BCHW = torch.from_numpy(extractors.images()).permute(0, 3, 1, 2).float() / 255
    return whole(transform(image_BCHW)).pred_score.tolist()


if __name__ == "__main__":
    made = new_model()
    write_checkpoint(made)
    found = results(made) | {"whole_scores": whole_scores(made)}
    (FOLDER / "anomalib_2.7.0.json").write_text(json.dumps(found) + "\n")
