# SPDX-License-Identifier: Apache-2.0
"""The ablation studies: the shipped configs, the paper's tables, and the whole command on the generated data."""

from pathlib import Path

import pandas as pd
import pytest
import yaml

from anomalib_intra.benchmark.job import BenchmarkRun
from anomalib_intra.benchmark.runs import build_model
from anomalib_intra.experiments.ablations import StudyRuns, ablations
from anomalib_intra.experiments.ablations.published import STUDIES
from anomalib_intra.experiments.ablations.tables import study_table

from ..conftest import CONFIGS, TINY, InThisProcess
from ..test_cli import SIZES

SHIPPED = {path.stem: yaml.safe_load(path.read_text()) for path in (CONFIGS / "ablations").glob("*.yaml")}


# ---- the shipped configs ---------------------------------------------------------------------------------------------


def test_there_is_a_config_for_every_table() -> None:
    assert set(SHIPPED) == set(STUDIES)


@pytest.fixture(scope="module")
def shipped_runs() -> list[BenchmarkRun]:
    return list(StudyRuns(Path("out"))({name: one["benchmark"] for name, one in SHIPPED.items()}))


def test_shipped_studies_have_the_papers_categories_sizes_and_epochs(shipped_runs) -> None:
    wanted = {
        (model, category)
        for study in STUDIES.values()
        for model in study.headings
        for category in study.published().index
    }
    assert {(run.model, run.category) for run in shipped_runs} == wanted
    for run in shipped_runs:
        assert run.config["image_size"] == [SIZES[run.category]] * 2  # Table A.7
        assert run.config["model"]["trainer"] == {"max_epochs": 200}
        assert run.config["model"]["init_args"]["patience"] == 200  # so that early stopping ends no run


def test_studies_share_the_runs_of_the_papers_model(shipped_runs) -> None:
    assert len(shipped_runs) == 23  # 7 of the paper's model, and 5 + 5 + 2 + 4 others
    assert sum(run.model == "InTra" for run in shipped_runs) == 7
    assert len({run.folder for run in shipped_runs}) == 23
    assert all(run.all == shipped_runs for run in shipped_runs)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("long_residuals", [{"long_residuals": True}, {"long_residuals": False}]),
        ("attention", [{"attention": "mfsa"}, {"attention": "msa"}]),
        ("position", [{"position": "local"}, {"position": "global"}]),
        ("window_size", [{"window_size": 5}, {"window_size": 7}, {"window_size": 9}]),
    ],
)
def test_models_of_a_study_differ_in_one_argument_alone(name: str, arguments: list[dict]) -> None:
    grid = SHIPPED[name]["benchmark"]["model"]["grid"]
    assert [entry["name"] for entry in grid] == list(STUDIES[name].headings)
    small = {"embed_dim": 16, "depth": 2, "num_heads": 2}
    for entry, expected in zip(grid, arguments, strict=True):
        model = build_model({**entry, "init_args": {**entry["init_args"], **small}}, (256, 256))
        paper = build_model({"class_path": "anomalib_intra.InTra", "init_args": {"patience": 200, **small}}, (256, 256))
        differing = {key for key in paper.hparams if model.hparams[key] != paper.hparams[key]}
        assert {key: model.hparams[key] for key in expected} == expected
        assert differing <= set(expected)


# ---- tables ----------------------------------------------------------------------------------------------------------


def test_the_papers_own_model_has_the_same_figures_in_every_table() -> None:
    """Table 5 prints 92.5 and 80.5 for metal nut and has no category in common with the others."""
    by_heading = [
        STUDIES["long_residuals"].published()[["Det. With", "Seg. With"]],
        STUDIES["attention"].published()[["Det. MFSA", "Seg. MFSA"]],
        STUDIES["window_size"].published()[["Det. 7 x 7", "Seg. 7 x 7"]],
    ]
    first = by_heading[0]
    for table in by_heading[1:]:
        assert (table.to_numpy() == first.loc[table.index].to_numpy()).all()


def test_measured_figures_stand_under_the_papers_headings_whatever_their_order() -> None:
    rows = pd.DataFrame(
        [
            {"model": model, "category": category, "seed": seed, "image_AUROC": image, "pixel_AUROC": pixel}
            for model, category, seed, image, pixel in [
                ("InTra", "transistor", 1, 0.90, 0.94),
                ("InTra", "transistor", 2, 0.80, 0.96),
                ("InTra with local positions", "transistor", 1, 0.70, 0.60),
                ("InTra", "weave", 1, 0.50, 0.40),
            ]
        ]
    )
    table = study_table(rows, "position")
    headings = ["Det. Local", "Det. Global", "Seg. Local", "Seg. Global"]
    assert list(table.columns) == [*headings, *(f"{name}, paper" for name in headings)]
    assert table.loc["transistor"].round(6).tolist() == [70.0, 85.0, 60.0, 95.0, 80.4, 95.8, 82.6, 96.1]
    assert table.loc["weave"].fillna(-1).round(6).tolist() == [-1, 50, -1, 40, -1, -1, -1, -1]


# ---- running ---------------------------------------------------------------------------------------------------------


def write_config(path: Path, models: dict[str, dict], **others: object) -> None:
    """A study of tiny models with the layout of the shipped ones; its data is at a root that is not there."""
    tiny = {**{key: value for key, value in TINY.items() if key != "image_size"}, "windows_per_image": 4}
    trainer = {"max_epochs": 1, "enable_progress_bar": False}
    grid = [
        {
            "name": name,
            "class_path": "anomalib_intra.InTra",
            "init_args": {**tiny, "patience": 200, **arguments},
            "trainer": trainer,
        }
        for name, arguments in models.items()
    ]
    data = {
        "class_path": "anomalib_intra.TextureDemo",
        "init_args": {"root": "none", "category": {"grid": ["weave"]}, "num_workers": 0},
    }
    sizes = {"weave": [64, 64], "grid": [512, 512]}
    benchmark = {"image_size": sizes, "data": data, "model": {"grid": grid}}
    path.parent.mkdir(exist_ok=True)
    path.write_text(yaml.safe_dump({"accelerator": "cpu", "benchmark": benchmark, **others}, sort_keys=False))


@pytest.fixture(scope="module")
def whole(few_root: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, list[list[str]]]:
    """Two studies, stopped in the second run, then one of them alone, then the rest."""
    folder = tmp_path_factory.mktemp("ablations")
    write_config(folder / "configs" / "attention.yaml", {"InTra": {}, "InTra with MSA": {"attention": "msa"}})
    write_config(
        folder / "configs" / "position.yaml", {"InTra with local positions": {"position": "local"}, "InTra": {}}
    )
    pages, output, run = [], folder / "out", BenchmarkRun.run

    def interrupted(self: BenchmarkRun, task_id: int | None = None) -> dict:
        if self.model == "InTra with MSA":
            raise KeyboardInterrupt
        return run(self, task_id)

    arguments = {"configs": folder / "configs", "root": few_root, "output": output}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("multiprocessing.context.SpawnContext.Process", InThisProcess)
        patch.setattr(BenchmarkRun, "run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            ablations(**arguments)
        pages.append((output / "ablations.md").read_text())
        patch.setattr(BenchmarkRun, "run", run)
        for only in ("position", None):
            ablations(**arguments, only=only)
            pages.append((output / "ablations.md").read_text())
    return folder / "configs", output, pages


def test_a_stopped_run_leaves_a_page_that_says_what_is_missing(whole) -> None:
    _, _, (stopped, position, done) = whole
    local, msa = ("- InTra with local positions on weave", "- InTra with MSA on weave")
    assert local in stopped
    assert msa in stopped
    assert local not in position
    assert msa in position
    assert "- InTra" not in done
    assert "Failed" not in done


def test_the_page_has_the_layout_of_the_paper(whole) -> None:
    _, output, (*_, page) = whole
    assert page.index("Table 4") < page.index("Table 5")
    assert "Table 3" not in page
    heading = next(line for line in page.splitlines() if "Det. MFSA" in line)
    columns = [column.strip() for column in heading.strip("|").split("|")]
    assert columns[1:5] == ["Det. MFSA", "Det. MSA", "Seg. MFSA", "Seg. MSA"]
    rows = pd.read_csv(output / "ablations.csv")
    shared = rows[rows["model"] == "InTra"]
    assert list(shared["ablation"]) == ["attention", "position"]
    figure = f"{100 * shared['image_AUROC'].iloc[0]:.1f}"
    row = [cell.strip() for cell in next(x for x in page.splitlines() if x.startswith("| weave")).split("|")]
    assert row[2] == figure
    assert row[6] == "-"  # the paper has no such category
    assert rows["error"].isna().all()
    assert set(rows["image_size"]) == {"[64, 64]"}


def test_the_shared_run_is_run_once(whole) -> None:
    _, output, _ = whole
    assert sorted(path.parts[-4] for path in output.rglob("row.json")) == [
        "InTra", "InTra with MSA", "InTra with local positions",
    ]  # fmt: skip
    rows = pd.read_csv(output / "ablations.csv")
    assert rows[rows["model"] == "InTra"]["fit_s"].nunique() == 1


def test_what_does_not_fit_is_refused_before_anything_runs(tmp_path: Path) -> None:
    configs, output = tmp_path / "configs", tmp_path / "out"
    with pytest.raises(ValueError, match="has no study at all; it has no YAML file"):
        ablations(configs, output=output)
    write_config(configs / "attention.yaml", {"InTra": {}})
    with pytest.raises(ValueError, match="has no study positions; it has attention"):
        ablations(configs, only="positions", output=output)
    write_config(configs / "position.yaml", {"InTra": {"position": "local"}})
    with pytest.raises(
        ValueError, match=r"attention and position have different settings for 'InTra on weave, seed 42'"
    ):
        ablations(configs, output=output)
    write_config(configs / "position.yaml", {"InTra": {}}, accelerator="auto")
    with pytest.raises(ValueError, match=r"several accelerators \(auto, cpu\)"):
        ablations(configs, output=output)
    assert not output.exists()
