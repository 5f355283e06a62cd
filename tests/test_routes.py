"""The plant: one table sends images to models and gives them tags; one job scores them all."""

import json
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pytest
import yaml
from conftest import SMALL_MODEL, names, read_scores, run_job, run_score, wait_for
from plain_loop import PlainLoop, contents
from processes import start_job
from small_models import save_small

from csflow.cluster import WorkerResources
from csflow.config import parse
from csflow.errors import ExitStatus, Failed, WrongUse
from csflow.inputs.listing import list_images, list_table
from csflow.output.reading import last_records, open_scores
from csflow.output.runs import Counts
from csflow.promotion import PromoteConfig, promote
from csflow.routes import read_routes
from csflow.scoring.config import ScoreConfig, ScoringSettings
from csflow.scoring.grouping import grouped, worker_bytes
from csflow.scoring.kept_models import KeptModels
from csflow.scoring.models import BrokenModel, Models
from csflow.scoring.plan import make_plan
from csflow.scoring.plan_log import PlannedShard
from csflow.scoring.record import exit_status
from csflow.storage import Location
from csflow.training.config import TrainConfig
from csflow.training.plant import train_by_routes

PRODUCTS = ("gear", "board", "cover")
ONE_CPU = WorkerResources(workers=1, cpus=1, gpus=0)


def rule(name: str = "gear", images: object = "s3://plant/{line}/gear/{part}_{camera}.png", **more: object):
    return {"name": name, "images": images, "model": f"s3://plant/models/{name}"} | more


# --- The table -------------------------------------------------------------------------------------------


def test_the_first_rule_that_matches_gives_the_model_and_the_tags() -> None:
    routes = read_routes(
        [
            rule(
                "top",
                "s3://plant/{line}/{product}/{part}_{camera}.png",
                where={"camera": ["top", "3"], "line": 4},
            ),
            rule("others", "s3://plant/{line}/{product}/{part}_{camera}.png", tags={"site": "north"}),
        ],
        {},
    )
    assert routes.of("s3://plant/4/gear/7_top.png") == (
        0,
        {"line": "4", "product": "gear", "part": "7", "camera": "top"},
    )
    assert routes.of("s3://plant/4/gear/7_side.png") == (
        1,
        {"line": "4", "product": "gear", "part": "7", "camera": "side", "site": "north"},
    )
    assert routes.of("s3://plant/4/gear/7.png") is None
    assert routes.tags() == {"line", "product", "part", "camera", "site"}


@pytest.mark.parametrize(
    ("rules", "said"),
    [
        (
            [rule(image="x")],
            "rule gear: image is no key of a rule, whose keys are name, images, where, tags, model",
        ),
        ([{"name": "gear", "model": "m"}], "rule gear: images is missing"),
        (["gear"], "rule 1: Input should be a valid dictionary"),
        ([rule(where={"lime": 4})], "rule gear: where: lime is no tag of .* (its tags: line, part, camera)"),
        ([rule(tags={"line": 4})], "rule gear: tags: line is a tag of .*, too; drop one of them"),
        ([rule(images="s3://plant/{line")], "rule gear: .* stands in braces"),
        ([rule(), rule(images="s3://other/**")], "2 rules have the name gear"),
        ([rule(where={"line": "4/5"})], "rule gear can match no image"),
        (
            [rule(), rule("late", where={"line": 4})],
            "rule late can match no image: gear above it take all of its",
        ),
        (
            [rule("left", "s3://plant/left_{x}.png"), rule("top", "s3://plant/{x}_top.png")],
            "rules left and top both match images such as s3://plant/left_.*top.png, and neither is an",
        ),
        (
            [rule(mask="m.png"), rule("late", "s3://late/*", model=rule()["model"])],
            "rules gear and late have one model, but not one mask",
        ),
        ([rule(model="s3://key:secret-of-the-plant@plant/models")], "rule gear holds credentials in a URL"),
    ],
)
def test_a_mistake_in_the_table_is_one_line_that_names_the_rule(rules: list[Any], said: str) -> None:
    with pytest.raises(WrongUse) as refused:
        read_routes(rules, {})
    assert str(refused.value).startswith("--routes: ")
    for part in said.split(" .* "):
        assert part.split(".*")[0] in str(refused.value)
    assert "\n" not in str(refused.value)
    assert "secret-of-the-plant" not in str(refused.value)


def test_an_exception_above_a_wide_rule_is_no_mistake() -> None:
    wide = rule("wide", "s3://plant/**")
    assert len(read_routes([rule(), wide], {}).rules) == 2
    with pytest.raises(WrongUse, match="gear can match no image: wide above it"):
        read_routes([wide, rule()], {})


@pytest.mark.parametrize("content", ["routes: []", "rules: [1]", "routes: {a: 1}", "- 1", "a: [", "\xff"])
def test_a_file_that_is_no_table_is_refused_by_name(tmp_path: Path, content: str) -> None:
    file = tmp_path / "plant.yaml"
    file.write_bytes(content.encode("latin-1"))
    with pytest.raises(WrongUse, match=rf"^--routes {file}: "):
        read_routes(str(file), {})
    with pytest.raises(WrongUse, match="there is no such file"):
        read_routes(str(tmp_path / "other.yaml"), {})


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "--model is required, or --routes"),
        (["--model", "m", "--routes", "plant.yaml"], "leave out --model"),
        (["--tags", "{line}/*", "--routes", "plant.yaml"], "leave out --tags"),
    ],
)
def test_models_are_named_in_one_way(flags: list[str], said: str) -> None:
    with pytest.raises(WrongUse, match=said):
        parse(ScoreConfig, None, ["--input", "i", "--output", "o", *flags])


# --- Three models ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(cells: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of three models of the same weights, so that one loop tells what each must score."""
    folder = tmp_path_factory.mktemp("models")
    loop = PlainLoop(Path(save_small(folder / "one").path))
    good = sorted((cells / "functional" / "train").iterdir())[:12]
    heldout = [loop.outcome(photograph.read_bytes()) for photograph in good]
    for number, product in enumerate(PRODUCTS):
        save_small(folder / product, heldout=tuple(heldout[number:]), name=product)
    return folder


@pytest.fixture(scope="module")
def plain_loop(models: Path) -> PlainLoop:
    return PlainLoop(models / "one")


@pytest.fixture(scope="module")
def images(cells: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """144 photographs of three products on two lines by two cameras."""
    folder = tmp_path_factory.mktemp("plant") / "images"
    photographs = sorted((cells / "functional" / "test").iterdir())[:144]
    for number, photograph in enumerate(photographs):
        product, camera = PRODUCTS[number % 3], ("top", "side")[number // 3 % 2]
        place = folder / f"line-{number // 6 % 2}" / product / f"{number:03}_{camera}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(photograph.read_bytes())
    return folder


def table(folder: Path, images: Path, *addresses: Path) -> Path:
    """A file of one rule for each model, which has the name of its product."""
    rules = [
        rule(model.stem, f"{images}/{{line}}/{model.stem}/{{part}}_{{camera}}.png", model=str(model))
        for model in addresses
    ]
    file = folder / "plant.yaml"
    file.write_text(yaml.safe_dump({"routes": rules}))
    return file


def geojson(file: Path, side: int) -> str:
    """A file with the upper right triangle of a picture of this side."""
    ring = [(0, 0), (side, 0), (side, side)]
    file.write_text(json.dumps({"type": "Polygon", "coordinates": [ring]}))
    return str(file)


def all_of(models: Path) -> list[Path]:
    return [models / product for product in PRODUCTS]


def damaged(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    return folder


def find(tmp_path: Path, routes: Path, images: Path) -> Models:
    flags = ["--routes", str(routes), "--input", str(images), "--output", str(tmp_path / "output")]
    config = parse(ScoreConfig, None, flags)
    models = Models.find(config)
    models.freeze(Location(config.output), "run", list_images(config.input, {}), None)
    for one in models.runs:
        one.shards = make_plan(one.listing, one.outcomes, "run", retry_errors=False)
    return models


def settings_of(models: Models) -> list[ScoringSettings]:
    return [ScoringSettings(one.directory, one.output, "run", True, 0.01, None) for one in models.runs]


def batch(shards: list[PlannedShard]) -> dict[str, list[str]]:
    return {"shards": [json.dumps([shard.to_row() for shard in shards])]}


def test_each_model_has_a_plan_of_its_own_images(models, images, tmp_path) -> None:
    found = find(tmp_path, table(tmp_path, images, models / "gear", models / "board"), images)
    assert [one.model.name for one in found.runs] == ["gear", "board"]
    for one in found.runs:
        planned = [uri for shard in one.shards for uri in shard.images()["image_uri"].to_pylist()]
        assert planned == sorted(map(str, images.glob(f"*/{one.model.name}/*.png")))
    assert found.unrouted is not None
    assert found.unrouted.images == 48
    assert f"/{PRODUCTS[2]}/" in found.unrouted.first_uris(1)[0]


def test_two_addresses_of_one_model_are_one_model(models, images, tmp_path) -> None:
    pointer = tmp_path / "board.json"
    promote(PromoteConfig(model=str(models / "gear"), pointer=str(pointer)))
    (one,) = find(tmp_path, table(tmp_path, images, models / "gear", pointer), images).runs
    assert (one.rules, one.listing.images) == (["gear", "board"], 96)


def test_a_model_that_does_not_exist_is_wrong_use_and_one_that_is_damaged_is_not(
    models, images, tmp_path
) -> None:
    for address in (tmp_path / "gear", tmp_path / "gear.json"):
        with pytest.raises(WrongUse, match=f"rule gear: there is no model {address}"):
            find(tmp_path, table(tmp_path, images, address), images)
    (broken,) = find(tmp_path, table(tmp_path, images, damaged(tmp_path / "gear")), images).broken
    assert isinstance(broken, BrokenModel)
    assert broken.listing.images == 48
    assert "damaged" in broken.line()


def test_a_worker_keeps_the_last_models_and_loads_a_dropped_one_again(models, images, tmp_path) -> None:
    found = find(tmp_path, table(tmp_path, images, *all_of(models)), images)
    kept = KeptModels(settings_of(found), ONE_CPU, most=2)
    gear, board, cover = (one.shards for one in found.runs)
    loads = [
        sum(kept(batch([shard]))["loads"].to_pylist())
        for shard in (gear[0], board[0], gear[1], cover[0], gear[1], board[1])
    ]
    assert loads == [1, 1, 0, 1, 0, 1]  # gear was used after board
    assert len(kept._kept) == 2


def test_calls_for_more_models_than_may_be_kept_wait_and_all_end(models, images, tmp_path) -> None:
    found = find(tmp_path, table(tmp_path, images, *all_of(models)), images)
    kept = KeptModels(settings_of(found), ONE_CPU, most=1)
    work = [batch(one.shards) for one in [*found.runs, *found.runs]]
    with ThreadPoolExecutor(len(work)) as calls:
        results = list(calls.map(kept, work))
    assert all(value is None for result in results for value in result["failure"].to_pylist())
    assert len(kept._kept) == 1
    for one in found.runs:
        assert len(one.output.files("scores", {one.shards[0].date})) == len(one.shards)


def test_a_model_that_cannot_be_loaded_costs_its_own_shards_only(models, images, tmp_path) -> None:
    found = find(tmp_path, table(tmp_path, images, *all_of(models)), images)
    settings = settings_of(found)
    kept = KeptModels(settings, ONE_CPU, most=2)
    replaced = settings[1].output.model_id
    kept._settings[replaced] = ScoringSettings(settings[0].model, settings[1].output, "run", True, 0.01, None)
    for one, is_whole in zip(found.runs, (True, False, True), strict=True):
        rows = kept(batch(one.shards)).to_pylist()
        assert [row["shard"] for row in rows] == [shard.name for shard in one.shards]
        assert {row["is_of_model"] for row in rows} == {not is_whole}
        assert all((row["failure"] is None) == is_whole for row in rows)
    again = kept(batch(found.runs[1].shards)).to_pylist()
    assert "start the run again" in again[0]["failure"]
    assert again[0]["loads"] == 0  # it is not tried again for every shard


def test_groups_have_shards_of_one_model_and_what_takes_longest_comes_first() -> None:
    def shards(model_id: str, count: int) -> list[PlannedShard]:
        return [PlannedShard(f"{n}", "2026-11-02", Location("s3://a/b"), n, model_id) for n in range(count)]

    small = [shard for number in range(50) for shard in shards(f"small-{number}", 4)]
    groups = list(grouped([*small, *shards("large", 200)], workers=2))
    assert all(len({shard.model_id for shard in group}) == 1 for group in groups)
    assert groups[0][0].model_id == "large"
    assert Counter(group[0].model_id for group in groups)["small-7"] == 1
    assert sorted(shard.name for group in groups for shard in group) == sorted(
        shard.name for shard in [*small, *shards("large", 200)]
    )
    assert [len(group) for group in grouped(shards("alone", 200), workers=2)] == [1] * 200


def test_a_worker_needs_memory_for_the_largest_models_that_it_keeps() -> None:
    gigabyte = 1 << 30
    alone = [gigabyte + own for own in (1, 5, 3, 2)]
    assert worker_bytes(alone, kept=2) == gigabyte + 5 + 3
    assert worker_bytes(alone[:1], kept=4) == alone[0]


# --- Training --------------------------------------------------------------------------------------------


def test_a_training_by_rules_is_one_training_for_each_model(images: Path, tmp_path: Path) -> None:
    """Rules of one model train it together; a training that fails does not stop the others."""
    gear, board = (f"{images}/{{line}}/{product}/*.png" for product in ("gear", "board"))
    rules = [
        rule("gear-0", gear, where={"line": "line-0"}, model="m/gear"),
        rule("gear-1", gear, where={"line": "line-1"}, model="m/gear"),
        rule("board", board, model="m/board", mask=geojson(tmp_path / "mask.json", 300)),
    ]
    settings = {"input": [str(images)], "output": str(tmp_path / "models"), "routes": rules}
    trained: list[tuple[str, str | None, str | None, int]] = []
    masks: list[str | None] = []

    def train(config: TrainConfig, listed: pa.Table) -> ExitStatus:
        trained.append((config.output, config.name, config.work_dir, listed.num_rows))
        masks.append(config.mask)
        if config.name == "gear-0":
            raise Failed("the loss became NaN")
        return ExitStatus.DONE

    def listed(config: TrainConfig) -> pa.Table:
        return list_table(config.input, {})

    with pytest.raises(Failed, match=r"1 of 2 models were not trained \(gear-0, gear-1\)"):
        train_by_routes(TrainConfig.model_validate(settings), listed, train)
    place = f"{tmp_path}/models"
    assert trained == [
        (f"{place}/gear-0", "gear-0", f"{place}/_work", 48),
        (f"{place}/board", "board", f"{place}/_work", 48),
    ]
    assert masks == [None, str(tmp_path / "mask.json")]
    trained.clear()
    beyond = geojson(tmp_path / "beyond.json", 400)
    only = TrainConfig.model_validate(settings | {"only": "board"})
    assert train_by_routes(only, listed, train) == ExitStatus.DONE
    assert [name for _, name, *_ in trained] == ["board"]
    for wrong, said in (
        ({"only": ["bord"]}, "--only bord is no rule"),
        ({"routes": [rule("a/b", gear)]}, "rule a/b: its model goes to a folder"),
        ({"routes": [*rules, rule("cover", "s3://other/*")]}, "rule cover: --input has 0 images"),
        ({"routes": [*rules[:2], rules[2] | {"mask": "none.png"}]}, "rule board: mask .*none.png cannot be"),
        (
            {"routes": [*rules[:2], rules[2] | {"mask": beyond}]},
            "board: mask .* has the point x 400, y 0 out",
        ),
        ({"tile": 64}, "rule board: mask and --tile exclude each other"),
    ):
        trained.clear()
        with pytest.raises(WrongUse, match=said):
            train_by_routes(TrainConfig.model_validate(settings | wrong), listed, train)
        assert not trained
    for wrong in ({"name": "x"}, {"evaluate": "labels.csv"}, {"mask": "mask.png"}):
        with pytest.raises(WrongUse, match=f"--{next(iter(wrong))} is of one model"):
            TrainConfig.model_validate(settings | wrong)


@pytest.mark.soak
def test_models_trained_by_a_table_score_by_it_and_are_not_trained_again(
    images: Path, ray_cluster: object, tmp_path: Path
) -> None:
    place = tmp_path / "models"
    routes = table(tmp_path, images, place / "gear", place / "board")
    rules = yaml.safe_load(routes.read_text())["routes"]
    rules[0]["mask"], rules[1]["mask"] = "auto", geojson(tmp_path / "mask.json", 300)
    routes.write_text(yaml.safe_dump({"routes": rules}))
    good = [images / "line-0" / product for product in ("gear", "board")]
    arguments = ["--routes", routes, "--input", *good, "--output", place, *SMALL_MODEL, "--epochs", 1]
    job = run_job("train", *arguments)
    assert job.returncode == 0, job.stderr
    before = {file: file.stat().st_mtime_ns for file in place.glob("*/config.json")}
    assert len(before) == 2
    again = run_job("train", *arguments, "--resume")
    assert again.returncode == 0, again.stderr
    assert again.stdout.count(" is trained") == 2
    assert {file: file.stat().st_mtime_ns for file in place.glob("*/config.json")} == before
    assert len(list(place.glob("_work/features/*"))) == 2, "one for all models of one mask"
    flags = ["--routes", routes, "--input", *good, "--output", tmp_path / "scores"]
    assert run_score(*flags) == ExitStatus.DONE
    assert Counter(read_scores(tmp_path / "scores").model_name) == {"gear": 24, "board": 24}


@pytest.mark.parametrize(
    ("unrouted", "status"), [("error", ExitStatus.INCOMPLETE), ("ignore", ExitStatus.DONE)]
)
def test_images_that_no_rule_matches_are_an_error_or_not_as_asked(unrouted: str, status: ExitStatus) -> None:
    flags = ["--routes", "plant.yaml", "--input", "i", "--output", "o", "--unrouted", unrouted]
    zero = dict.fromkeys(Counts.model_fields, 0) | {"errors_in_this_run": {}}
    counts = Counts.model_validate(zero | {"listed": 5, "scored": 5, "unrouted": 3})
    assert exit_status(counts, False, parse(ScoreConfig, None, flags)) == status


# --- The job ---------------------------------------------------------------------------------------------


def test_a_night_of_three_models_accounts_for_each_image_and_names_what_is_left(
    ray_cluster, models, images, plain_loop, tmp_path, run_record, capsys
) -> None:
    """The cover's model is damaged, and no rule names the board."""
    broken, output = damaged(tmp_path / "cover"), tmp_path / "output"
    file = table(tmp_path, images, models / "gear", broken)
    arguments = ["--input", images, "--output", output, "--false_positive_rate", 0.2]
    arguments += ["--precision", "float32"]
    assert run_score("--routes", file, *arguments) == ExitStatus.INCOMPLETE
    printed = capsys.readouterr().out
    record = run_record(output)
    counts = {name: record["counts"][name] for name in ("listed", "scored", "missing", "unrouted")}
    assert counts == {"listed": 96, "scored": 48, "missing": 48, "unrouted": 48}
    assert "unrouted  48 images match no rule, such as " in printed
    assert "INCOMPLETE: 48 images match no rule; add one to --routes, or pass --unrouted ignore" in printed
    assert f"INCOMPLETE: model {broken} cannot be loaded: model {broken} is damaged" in printed
    assert list(record["not_loaded"]) == [str(broken)]
    assert record["model"] is record["drift"] is None
    assert record["models_loaded"] in (1, 2)  # by one worker or both

    assert run_score("--routes", table(tmp_path, images, *all_of(models)), *arguments) == ExitStatus.DONE
    plain_loop.assert_same(read_scores(output), contents(images))
    record = run_record(output)
    sql = f"""
        SELECT model_name, count(*),
               count_if(is_anomalous AND run_id = '{record["run_id"]}'),
               bool_and(tags['line'] = split_part(image_uri, '/', -3)),
               bool_and(contains(image_uri, '_' || tags['camera'] || '.'))
        FROM '{output}/scores/*/*/*.parquet' GROUP BY model_name
    """
    found = {name: row for name, *row in duckdb.sql(sql).fetchall()}
    assert {one["model_name"]: one["rules"] for one in record["models"]} == {p: [p] for p in PRODUCTS}
    for one in record["models"]:
        assert found[one["model_name"]] == [48, one["counts"]["anomalous_in_this_run"], True, True]
        assert one["counts"]["listed"] == 48
        opened = open_scores(Location(str(output)), one["model_id"])
        (latest, *_) = last_records(opened)
        assert latest.model.model_name == one["model_name"]
        assert latest.counts.anomalous_in_this_run == one["counts"]["anomalous_in_this_run"]
        assert latest.drift is None or latest.drift.sample == latest.counts.scored_in_this_run


@pytest.mark.soak
def test_after_a_kill_two_runs_of_three_models_give_every_image_one_row(
    ray_cluster, models, images, plain_loop, tmp_path
) -> None:
    output, routes = tmp_path / "output", table(tmp_path, images, *all_of(models))
    arguments = ["--routes", routes, "--input", images, "--output", output, "--models_kept", 1]
    arguments += ["--precision", "float32"]
    killed = start_job(*arguments)
    wait_for(lambda: len(list(output.glob("scores/*/*/part-*.parquet"))) >= 2, killed)
    killed.kill()
    killed.communicate()
    assert 0 < len(names(read_scores(output))) < 144
    other = start_job(*arguments)
    assert run_score(*arguments) == ExitStatus.DONE
    printed = other.communicate(timeout=300)[0]
    assert other.returncode == 0, printed
    plain_loop.assert_same(read_scores(output), contents(images))
    assert len(list(output.glob("_plans/*/*.json"))) == 3
