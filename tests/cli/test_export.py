"""`sensebatch export`: what it prints, what it refuses, and a push to a Hub of this machine."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from sensebatch.cli import exits
from sensebatch.tasks import Task
from sensebatch.units import counted
from tests.cli.conftest import Invoke
from tests.executor.fakes import make_job
from tests.export.fake_hub import TOKEN, FakeHub, fake_hub
from tests.export.folders import grid, make_folder, parquet_ids

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of nine jobs, one of which failed."""
    jobs = [*grid(8, metadata={"tags": ["sky"]}), make_job("fails", prompt="fails")]
    return make_folder(tmp_path_factory.mktemp("export") / "ships", jobs)


def test_export_prints_what_it_wrote_and_how_to_open_it(invoke: Invoke, folder: Path) -> None:
    ended = invoke("export", "hf", folder, "out", "--license", "cc-by-4.0")
    assert ended.code == exits.DONE
    assert ended.out.splitlines() == [
        "out: 8 jobs in 1 shard",
        "  written  1 shard with 8 images",
        "  left out 1 job that is not done",
        "  open     datasets.load_dataset('out', 't2i')",
    ]
    card = Path("out/README.md").read_text()
    assert "license: cc-by-4.0\npretty_name: ships\n" in card
    again = invoke("export", "hf", folder, "out", "--license", "cc-by-4.0")
    assert "  written  nothing: all of it is there already\n" in again.out


def test_export_without_a_licence_says_so(invoke: Invoke, folder: Path) -> None:
    ended = invoke("export", "webdataset", folder, "out")
    assert "  licence  unknown; --license names one\n" in ended.out
    assert "load_dataset" not in ended.out
    assert ended.out.endswith(
        "  open     webdataset.WebDataset(sorted(glob.glob('out/t2i/*.tar')))\n"
    )
    assert list(Path("out/t2i").glob("*.tar"))


def test_licence_and_title_stay_until_others_are_given(invoke: Invoke, folder: Path) -> None:
    def said(*options: str) -> tuple[str, str]:
        ended = invoke("export", "hf", folder, "out", *options)
        assert ended.code == exits.DONE
        head = Path("out/README.md").read_text().splitlines()[1:3]
        assert ("  licence  unknown" in ended.out) == (head[0] == "license: unknown")
        return head[0].removeprefix("license: "), head[1].removeprefix("pretty_name: ")

    assert said() == ("unknown", "ships")
    assert said("--license", "CC-BY-4.0", "--title", "Boats") == ("cc-by-4.0", "Boats")
    assert said() == ("cc-by-4.0", "Boats")
    assert said("--where", "seed > 3", "--title", "Ships") == ("cc-by-4.0", "Ships")
    assert invoke("export", "hf", folder, "out", "--json").json["license"] == "cc-by-4.0"
    assert said("--license", "unknown") == ("unknown", "Ships")


def test_card_that_was_edited_is_spoken_of(invoke: Invoke, folder: Path) -> None:
    card, options = Path("out/README.md"), ["export", "hf", folder, "out"]
    invoke(*options)
    card.write_text(card.read_text() + "My own words.\n")
    ended = invoke(*options)
    assert "  card     README.md was changed by hand, and is left as it is\n" in ended.out
    assert "licence" not in ended.out
    card.write_text(card.read_text().replace("t2i/train-*", "t2i/gone-*"))
    ended = invoke(*options)
    assert "left as it is but for the subsets and splits" in " ".join(ended.out.split())
    assert "path: t2i/train-*.parquet" in card.read_text()
    assert "gone" not in card.read_text()
    card.write_text("My own words.\n")
    said = " ".join(invoke(*options).out.split())
    assert "no header whose configs could be brought up to date, so that t2i may not load" in said
    assert invoke(*options, "--json").json["card"] == "outdated"
    # What the message says mends it.
    card.rename("mine.md")
    assert "card" not in invoke(*options).out
    assert "path: t2i/train-*.parquet" in card.read_text()


def test_json_is_one_object(invoke: Invoke, folder: Path) -> None:
    found = invoke("export", "hf", folder, "out", "--split", "a=0.5,b=0.5", "--json").json
    assert (found["jobs"], found["not_done"], found["tasks"]) == (8, 1, ["t2i"])
    assert (found["out"], found["pushed_to"]) == ("out", None)


def test_selection_decides_which_jobs_are_exported(invoke: Invoke, folder: Path) -> None:
    chosen = ["--where", "seed > 3 AND has(tags, 'sky')"]
    assert invoke("export", "hf", folder, "out", *chosen).code == exits.DONE
    assert parquet_ids(Path("out")) == [f"image-{number:04d}" for number in range(4, 8)]
    # Fewer jobs: the export follows, and keeps no row that is no longer chosen.
    ended = invoke("export", "hf", folder, "out", "--where", "seed = 5")
    assert ended.code == exits.DONE
    assert "  removed  3 rows of jobs that are left out now, or have changed\n" in ended.out
    assert parquet_ids(Path("out")) == ["image-0005"]


def test_subset_that_is_no_longer_chosen_is_said_to_be_removed(
    invoke: Invoke, tmp_path: Path
) -> None:
    root = make_folder(tmp_path / "run", [*grid(3), make_job("a", Task.ASK)])
    assert "removed" not in invoke("export", "hf", root, "out").out
    ended = invoke("export", "hf", root, "out", "--task", "ask")
    assert ended.out.splitlines()[:3] == [
        "out: 1 job in 1 shard",
        "  written  nothing: all of it is there already",
        "  removed  1 shard and 3 rows of jobs that are left out now, or have changed",
    ]
    invoke("export", "hf", root, "out")
    found = invoke("export", "hf", root, "out", "--task", "ask", "--json").json
    assert (found["removed_shards"], found["removed_rows"]) == (1, 3)


def test_documented_keys_are_those_of_the_json(invoke: Invoke, folder: Path) -> None:
    found = invoke("export", "hf", folder, "out", "--json").json
    section = (ROOT / "docs/dataset.md").read_text().partition("`--json` prints one object")[2]
    table = section.partition("\n\nMeasured")[0]
    cells = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    assert sorted(re.findall("`([a-z_]+)`", "".join(cells))) == sorted(found)


def test_picks_decide_which_jobs_are_exported(invoke: Invoke, folder: Path) -> None:
    run = invoke("jobs", folder, "--json", "--columns", "run").json[0]["run"]
    jobs = {
        "image-0002": {"pick": "keep"},
        "image-0003": {"pick": "reject"},
        "lost": {"pick": "keep"},
    }
    picks = {"sensebatch_picks": 1, "runs": [{"run": run, "jobs": jobs}]}
    Path("picks.json").write_text(json.dumps(picks))
    ended = invoke("export", "hf", folder, "out", "--picks", "picks.json")
    assert parquet_ids(Path("out")) == ["image-0002"]
    assert "do not count: lost" in ended.err


def test_near_duplicates_are_left_out(invoke: Invoke, folder: Path) -> None:
    options = ["--dedupe", "--dedupe-distance", "32"]
    ended = invoke("export", "hf", folder, "out", *options)
    num_kept = len(parquet_ids(Path("out")))
    assert 1 <= num_kept < 8
    which = "whose images look like those of an earlier job (--dedupe)"
    assert f"  left out {counted(8 - num_kept, 'job')} {which}\n" in ended.out
    found = invoke("export", "hf", folder, "out", *options, "--json").json
    assert (found["jobs"], found["look_alikes"], found["not_done"]) == (num_kept, 8 - num_kept, 1)
    # Those that other conditions leave out are not counted.
    chosen = ["--where", "seed = 3", *options, "--json"]
    assert invoke("export", "hf", folder, "out", *chosen).json["look_alikes"] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--where", "sede = 1"], "sede"),
        (["--where", "seed = 99"], "expected jobs to export, found none that are selected"),
        (["--status", "failed"], "expected jobs that are done, found 1 that is not"),
        (["--license", "cc-by4"], "did you mean 'cc-by-4.0'?"),
        (["--split", "train"], "train=0.9,test=0.1; found 'train'"),
        (["--split", "train=most"], "train=0.9,test=0.1; found 'train=most'"),
        (["--split", "train=0.5"], "--split: expected names and shares that sum to 1"),
        (["--shard-size", "many"], "--shard-size: expected a size such as 500MB or 1GiB"),
        (["--shard-size", "0MB"], "--shard-size: expected a size such as 500MB or 1GiB"),
        (["--image-quality", "80"], "--image-quality: expected --image-format or --max-side"),
        (["--private"], "--private: expected --push beside it"),
        (["--push", "me/set"], "--push: expected --license beside it"),
        (["--push", "a b", "--license", "mit"], "--push: expected owner/name, found 'a b'"),
        (["--c2pa-key", "key.pem"], "expected both --c2pa-certificate and --c2pa-key"),
    ],
)
def test_mistakes_are_one_error_and_nothing_is_written(
    invoke: Invoke, folder: Path, options: list[str], message: str
) -> None:
    ended = invoke("export", "hf", folder, "out", *options)
    assert ended.code == exits.USAGE
    assert message in ended.err
    assert ended.err.count("sensebatch: ") == 1
    assert not Path("out").exists()


def test_places_that_cannot_be_written_are_named(invoke: Invoke, folder: Path) -> None:
    Path("notes").mkdir()
    Path("notes/mine.txt").write_text("mine")
    ended = invoke("export", "hf", folder, "notes")
    assert ended.code == exits.USAGE
    assert "notes: expected an empty folder or an earlier export, found 'mine.txt'" in ended.err
    ended = invoke("export", "hf", folder, "memory://x", "--push", "me/set", "--license", "mit")
    assert "--push: expected OUT to be a folder of this machine, found a URL" in ended.err
    ended = invoke("export", "hf", "nothing-here", "out")
    assert "nothing-here: expected a run's folder, found no state.db" in ended.err
    assert invoke("export", "parquet", folder, "out").code == exits.USAGE


def test_missing_and_damaged_files_are_left_out_on_request(invoke: Invoke, tmp_path: Path) -> None:
    root = make_folder(tmp_path / "run", grid(4))
    (root / "images/image-0000.png").unlink()
    (root / "images/image-0001.png").write_bytes(b"damaged")
    ended = invoke("export", "hf", root, "out")
    assert ended.code == exits.USAGE
    assert "job image-0000: images/image-0000.png: No such file" in ended.err
    ended = invoke("export", "hf", root, "out", "--skip-missing")
    assert ended.code == exits.DONE
    assert "  left out 2 jobs with missing or damaged files:\n" in ended.out
    assert parquet_ids(Path("out")) == ["image-0002", "image-0003"]


def test_ctrl_c_says_that_nothing_is_lost(
    invoke: Invoke, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("sensebatch.export.hf.write", interrupted)
        ended = invoke("export", "hf", folder, "out")
    assert ended.code == exits.INTERRUPTED
    assert ended.err == "stopped; the same command continues the export\n"
    assert invoke("export", "hf", folder, "out").code == exits.DONE


WITHOUT_TORCH = """
import sys
from sensebatch.cli.main import main
try:
    main(sys.argv[1:])
except SystemExit as ended:
    print(ended.code)
print(*(name for name in ("torch", "transformers", "datasets", "c2pa", "huggingface_hub")
        if name in sys.modules))
"""


def test_export_starts_without_torch(folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", WITHOUT_TORCH, "export", "hf", str(folder), "out"]
    ended = subprocess.run(
        command, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=True
    )
    assert ended.stdout.splitlines()[-2:] == ["0", ""]


def environment(hub: FakeHub | None = None, **more: str) -> dict[str, str]:
    """Returns the environment of a command that may ask no other Hub than this."""
    found = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_DISABLE_XET": "1", **more}
    found.pop("HF_TOKEN", None)
    if hub is not None:
        found |= {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_TELEMETRY": "1", **more}
    return found


def push(
    hub: FakeHub, folder: Path, cwd: Path, *options: str, token: str | None = TOKEN
) -> subprocess.CompletedProcess[str]:
    """Runs an export with a push in a process of its own, as huggingface_hub asks when imported."""
    home = {"HF_HOME": str(cwd / "home"), **({} if token is None else {"HF_TOKEN": token})}
    command = [sys.executable, "-m", "sensebatch", "export", "hf", str(folder), "out"]
    command += ["--license", "mit", "--push", "somebody/ships", *options]
    return subprocess.run(
        command, cwd=cwd, env=environment(hub, **home), capture_output=True, text=True, check=False
    )


def test_push_uploads_the_set_and_removes_shards_that_are_no_longer_there(
    folder: Path, tmp_path: Path
) -> None:
    with fake_hub() as hub:
        hub.files = {"t2i/train-00009.parquet": b"of an earlier export", "notes.txt": b"mine"}
        ended = push(hub, folder, tmp_path, "--private")
        assert ended.returncode == exits.DONE, ended.stderr
    assert f"  pushed   {hub.url}/datasets/somebody/ships\n" in ended.stdout
    assert "private" in str(hub.created)
    assert sorted(hub.files) == ["README.md", "notes.txt", "t2i/train-00000.parquet"]
    out = tmp_path / "out"
    for name in ("README.md", "t2i/train-00000.parquet"):
        assert hub.files[name] == (out / name).read_bytes()
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert ended.stderr == ""
    assert TOKEN not in ended.stdout
    assert TOKEN.encode() not in written


def test_push_that_is_refused_is_one_error_without_the_token(folder: Path, tmp_path: Path) -> None:
    with fake_hub() as hub:
        nobody = push(hub, folder, tmp_path, token=None)
        hub.refuses = 403
        refused = push(hub, folder, tmp_path)
    assert nobody.returncode == refused.returncode == exits.USAGE
    assert "log in with: hf auth login" in nobody.stderr
    assert "You may not do that" in refused.stderr
    for ended in (nobody, refused):
        assert len(ended.stderr.splitlines()) == 1, ended.stderr
        assert TOKEN not in ended.stderr
    assert not (tmp_path / "out").exists()


def test_hub_that_cannot_be_reached_is_one_error(folder: Path, tmp_path: Path) -> None:
    ended = push(FakeHub(url="http://127.0.0.1:9"), folder, tmp_path)
    assert ended.returncode == exits.RESUMABLE
    assert len(ended.stderr.splitlines()) == 1, ended.stderr
    assert "--push somebody/ships: " in ended.stderr
