"""The command line as a user has it: a process of its own, its exit code, its stdout and its stderr."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import fedcil

SMALL = [
    "--set=data.name=synthetic",
    "--set=data.classes=4",
    "--set=data.samples_per_class=20",
    "--set=stream.tasks=2",
    "--set=partition.name=iid",
    "--set=clients.count=4",
    "--set=clients.per_round=2",
    "--set=model.width=4",
    "--set=training.rounds=2",
    "--set=training.epochs=1",
    "--no-figures",
]
PRINTED = {
    "run_dir",
    "name",
    "method",
    "seed",
    "average_incremental_accuracy",
    "final_accuracy",
    "forgetting",
    "seconds",
    "bytes_up",
    "bytes_down",
    "short_rounds",
    "client_failures",
}


TINY = Path(__file__).with_name("tiny.toml")


def call(*arguments: str, cwd: Path, expect: int = 0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fedcil", *arguments]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == expect, done.stderr
    assert "Traceback" not in done.stderr
    return done


def test_the_command_that_is_printed_goes_on_where_the_scenario_says_where_its_data_are(tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    np.savez(tmp_path / "files" / "set.npz", images=np.zeros((40, 8, 8, 1), np.uint8), labels=np.arange(40) % 4)
    (tmp_path / "mine.py").write_text(
        "import numpy as np\nfrom fedcil.data import Dataset, Split, digest_of\n"
        "def load(section, root):\n"
        "    with np.load(root / 'set.npz') as file:\n"
        "        split = Split(file['images'], file['labels'])\n"
        "    return Dataset(name='mine', train=split, test=split, mean=(0.5,), std=(0.5,), class_names=tuple('abcd'),"
        " digest=digest_of(split, split))\n"
    )
    sets = ["data={name='mine:load', root='files'}", "stream.tasks=2", "clients={count=2, per_round=2}"]
    words = [f"--set={text}" for text in sets]
    stopped = call("run", "digits_fedavg", *words, "--no-figures", "--max-seconds=0", cwd=tmp_path, expect=5)
    printed = stopped.stderr.rpartition("`fedcil ")[2].split("`")[0]
    call(*shlex.split(printed), "--no-figures", cwd=tmp_path)


def test_a_folder_of_runs_can_be_compared_with_a_picture_beside_them(tmp_path: Path) -> None:
    call("run", "digits_fedavg", *SMALL, "--seeds=0,1", "--output=runs", "--figure=runs/comparison.png", cwd=tmp_path)
    whole = json.loads(call("compare", "runs", "--json", cwd=tmp_path).stdout)
    each = [f"runs/{path.name}" for path in sorted((tmp_path / "runs").iterdir())]
    assert any(path.endswith("comparison.png") for path in each)
    assert json.loads(call("compare", *each, "--json", cwd=tmp_path).stdout) == whole
    assert whole[0]["seeds"] == [0, 1]
    call("compare", "runs/comparison.png", cwd=tmp_path, expect=2)


def test_a_plan_counts_what_no_machine_can_hold(tmp_path: Path) -> None:
    facts = call("plan", "digits_mfcl", "--set=method.generator_width=65536", "--json", cwd=tmp_path)
    assert json.loads(facts.stdout)["tasks"][1]["payload_bytes_down"] > 10**12


def test_a_hint_is_given_once(tmp_path: Path) -> None:
    done = call("export", cwd=tmp_path, expect=2)
    assert done.stderr.count("Did you mean 'report'?") == 1


def test_a_warning_of_a_report_is_told_without_lines_of_the_program(tmp_path: Path) -> None:
    """A name that the figures' font cannot show."""
    folder = tmp_path / "pictures"
    for split in ("train", "test"):
        for name in ("one", "\u732b"):
            (folder / split / name).mkdir(parents=True)
            for number in range(4):
                Image.new("L", (8, 8), number).save(folder / split / name / f"{number}.png")
    data = f"data={{name='folder', root='{folder}'}}"
    more = ["--set=stream.tasks=2", "--set=clients={count=2, per_round=2}", "--set=training={rounds=1, epochs=1}"]
    call("run", "digits_fedavg", f"--set={data}", *more, "--no-figures", cwd=tmp_path)
    (run,) = (tmp_path / "runs").iterdir()
    done = call("report", str(run), "--output=page.html", cwd=tmp_path)
    assert {line.split(" ")[0] for line in done.stderr.splitlines()} == {"warning:"}


def test_a_record_that_lost_its_end_is_said(tmp_path: Path) -> None:
    call("run", "digits_fedavg", *SMALL, "--output=runs", cwd=tmp_path)
    (record,) = (tmp_path / "runs").glob("*/metrics.jsonl")
    record.write_bytes(record.read_bytes()[:300])
    done = call("report", str(record.parent), cwd=tmp_path, expect=2)
    assert "rounds are in it" in done.stderr


def test_a_warning_is_told_without_lines_of_the_program(tmp_path: Path) -> None:
    code = "from fedcil import cpu; cpu.bf16_instructions = tuple\nfrom fedcil.cli import main; main()"
    command = [sys.executable, "-c", code, "run", "digits_fedavg", *SMALL, "--set=training.precision=bf16"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    first, *_ = done.stderr.splitlines()
    assert first.startswith("warning: training.precision = 'bf16', but this machine has no instructions for it")
    assert "UserWarning" not in done.stderr


def test_version(tmp_path: Path) -> None:
    assert call("--version", cwd=tmp_path).stdout == f"fedcil {fedcil.__version__}\n"


def test_help_loads_neither_torch_nor_flwr_nor_ray(tmp_path: Path) -> None:
    for command in ([], ["run"], ["resume"], ["compare"], ["report"], ["plan"], ["list"], ["schema"]):
        code = (
            f"import sys; sys.argv = ['fedcil', *{command!r}, '--help']\n"
            "from fedcil.cli import main\n"
            "try: main()\n"
            "except SystemExit as end: assert not end.code\n"
            "assert not {'torch', 'flwr', 'ray', 'matplotlib'} & set(sys.modules)"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def test_run_prints_one_object_and_nothing_else(tmp_path: Path) -> None:
    done = call("run", "digits_fedavg", *SMALL, "--json", cwd=tmp_path)
    printed = json.loads(done.stdout)
    assert printed.keys() == PRINTED
    assert printed["method"] == "fedavg"
    assert 0 <= printed["average_incremental_accuracy"] <= 1
    run = fedcil.load(tmp_path / printed["run_dir"])
    assert {line["kind"] for line in run.lines} == {"round", "task", "boundary"}
    names = {path.name for path in run.path.iterdir()}
    wanted = {"scenario.toml", "environment.json", "partition.npz", "metrics.jsonl", "summary.json", "summary.csv"}
    assert names >= wanted | {"accuracy_matrix.csv", "checkpoints"}


def test_forgetting_is_null_for_one_task(tmp_path: Path) -> None:
    done = call("run", "digits_fedavg", *SMALL, "--set=stream.tasks=1", "--json", cwd=tmp_path)
    assert json.loads(done.stdout)["forgetting"] is None


def test_the_saved_scenario_runs_again_to_the_same_metrics(tmp_path: Path) -> None:
    first = json.loads(call("run", "digits_fedavg", *SMALL, "--json", cwd=tmp_path).stdout)["run_dir"]
    saved = str(tmp_path / first / "scenario.toml")
    second = json.loads(call("run", saved, "--no-figures", "--json", cwd=tmp_path).stdout)["run_dir"]
    assert fedcil.load(tmp_path / first).results == fedcil.load(tmp_path / second).results


def test_seeds_are_run_and_finished_ones_are_skipped(tmp_path: Path) -> None:
    call("run", "digits_fedavg", *SMALL, "--seeds=0,1", "--json", cwd=tmp_path)
    again = call("run", "digits_fedavg", *SMALL, "--seeds=0,1,2", "--json", cwd=tmp_path)
    assert [row["seed"] for row in json.loads(again.stdout)] == [0, 1, 2]
    assert len(list((tmp_path / "runs").iterdir())) == 3


def test_compare_gives_mean_and_deviation_over_seeds(tmp_path: Path) -> None:
    call("run", "digits_fedavg", *SMALL, "--seeds=0,1", "--json", cwd=tmp_path)
    folders = [str(path) for path in sorted((tmp_path / "runs").iterdir())]
    (group,) = json.loads(call("compare", *folders, "--json", cwd=tmp_path).stdout)
    values = [fedcil.load(folder).summary["final_accuracy"] for folder in folders]
    assert group["mean"]["final_accuracy"] == pytest.approx(sum(values) / 2)
    assert group["std"]["final_accuracy"] == pytest.approx(abs(values[0] - values[1]) / 2**0.5)


def test_report_and_figure_are_written(tmp_path: Path) -> None:
    folder = json.loads(call("run", "digits_fedavg", *SMALL, "--json", cwd=tmp_path).stdout)["run_dir"]
    page = Path(call("report", folder, cwd=tmp_path).stdout.strip())
    assert "<html" in (tmp_path / page).read_text()
    call("compare", folder, "--figure=picture.png", cwd=tmp_path)
    assert (tmp_path / "picture.png").read_bytes()[:4] == b"\x89PNG"


def test_plan_counts_without_training(tmp_path: Path) -> None:
    facts = json.loads(call("plan", "digits_mfcl", "--json", cwd=tmp_path).stdout)
    assert [task["rounds"] for task in facts["tasks"]] == [10] * 5
    assert [task["client_trainings"] for task in facts["tasks"]] == [50] * 5
    assert not (tmp_path / "runs").exists()


def test_plan_says_how_many_clients_will_be_there(tmp_path: Path) -> None:
    """The run's own draws, so the run asks just as many: members, away half of the time, in every round."""
    sets = [
        "population={name='turnover', size=8, replaced_per_task=0.5, replaced_per_round=0.25}",
        "availability={name='markov', rounds_on=3, rounds_off=3}",
        "clients={count=48, per_round=8}",
        "data.samples_per_class=40",
        "training.rounds=5",
        "server.patience=99",
    ]
    small = [
        *(text for text in SMALL if text.startswith("--set")),
        *(part for text in sets for part in ("--set", text)),
    ]
    facts = json.loads(call("plan", "digits_fedavg", *small, "--json", cwd=tmp_path).stdout)
    folder = json.loads(call("run", "digits_fedavg", *small, "--json", cwd=tmp_path).stdout)["run_dir"]
    lines = [json.loads(line) for line in (tmp_path / folder / "metrics.jsonl").read_text().splitlines()]
    for task in facts["tasks"]:
        asked = [len(line["cohort"]) for line in lines if line["kind"] == "round" and line["task"] == task["task"]]
        there = task["clients_present"]
        assert (there["least"], there["most"]) == (min(asked), max(asked))
        assert there["mean"] == pytest.approx(sum(asked) / len(asked))
        assert task["client_trainings"] == sum(asked)


def test_list_and_schema_are_for_programs_too(tmp_path: Path) -> None:
    listed = json.loads(call("list", "--json", cwd=tmp_path).stdout)
    assert "mfcl" in listed["methods"]
    assert "digits_mfcl" in listed["scenarios"]
    assert "properties" in json.loads(call("schema", cwd=tmp_path).stdout)
    assert (
        call("schema", "--tables", cwd=tmp_path).stdout
        == (Path(__file__).parent.parent / "docs" / "scenario.md").read_text()
    )


def test_one_damaged_run_does_not_hide_the_others(tmp_path: Path) -> None:
    for name, summary in (("a", "{"), ("b", '{"rounds": 1}'), ("c", "")):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "scenario.toml").write_text("")
        if summary:
            (tmp_path / "runs" / name / "summary.json").write_text(summary)
    listed = call("list", "runs", cwd=tmp_path).stdout
    assert listed == "runs: \n  runs/a (damaged)\n  runs/b\n  runs/c (not finished)\n"


@pytest.mark.parametrize("more", [[], ["--json"]])
def test_a_working_folder_that_is_gone(tmp_path: Path, more: list[str]) -> None:
    (tmp_path / "gone").mkdir()
    words = " ".join([sys.executable, "-m", "fedcil", "plan", "digits_fedavg", *more])
    environment = os.environ | {"PYTHONPATH": str(Path(fedcil.__file__).parent.parent)}
    command = ["sh", "-c", f"cd gone && rmdir ../gone && {words}"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: the working folder is gone")
    assert "Traceback" not in done.stderr
    assert bool(done.stdout) == bool(more)


@pytest.mark.parametrize(
    ("arguments", "code", "kind"),
    [
        (["run", "no_such_scenario"], 2, "bad_scenario"),
        (["run", "digits_mfcl", "--set=method.w_iee=1"], 2, "bad_scenario"),
        (["run", "digits_mfcl", "--seeds=a"], 2, "bad_scenario"),
        (["run", "digits_mfcl", "--set=clients.count=5000"], 2, "bad_scenario"),
        (["run", "digits_mfcl", "--set=engine.address=x", "--engine=none"], 2, "bad_scenario"),
        (["run", "paper/tiny_imagenet_mfcl", "--data-root=nowhere"], 2, "data_missing"),
        (["resume", "nowhere"], 2, "bad_input"),
        (["compare", "nowhere"], 2, "bad_input"),
        (["list", "nothing"], 2, "bad_input"),
        (["run", "digits_mfcl", "--no-such-option"], 2, "bad_input"),
        (["nothing"], 2, "bad_input"),
    ],
)
def test_bad_input_ends_with_its_code_and_a_json_error(
    arguments: list[str], code: int, kind: str, tmp_path: Path
) -> None:
    done = call(*arguments, "--json", cwd=tmp_path, expect=code)
    error = json.loads(done.stdout)["error"]
    assert error["kind"] == kind
    assert error.keys() >= {"kind", "where", "allowed", "next"}
    assert error["what"].splitlines()[0] in done.stderr


def test_too_few_clients_is_exit_code_4_and_can_be_resumed(tmp_path: Path) -> None:
    never = ["--set=availability.name=bernoulli", "--set=availability.probability=0.0", "--set=server.patience=2"]
    done = call("run", "digits_fedavg", *SMALL, *never, "--json", cwd=tmp_path, expect=4)
    assert json.loads(done.stdout)["error"]["kind"] == "too_few_clients"
    (folder,) = (tmp_path / "runs").iterdir()
    assert len(fedcil.load(folder).lines) == 2
    call("resume", str(folder), "--json", cwd=tmp_path, expect=4)
    rounds = [(line["task"], line.get("round")) for line in fedcil.load(folder).lines]
    # Nothing twice: the task ended, and as many rounds were tried again.
    assert rounds == [(0, 0), (0, 1), (0, None), (0, None), (1, 0), (1, 1)]


def test_a_changed_scenario_is_not_resumed(tmp_path: Path) -> None:
    stopped = call("run", "digits_fedavg", *SMALL, "--max-seconds=0", "--data-root=here", cwd=tmp_path, expect=5)
    assert "`fedcil resume runs/digits_fedavg-0-" in stopped.stderr
    assert "--data-root here`" in stopped.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    done = call("resume", str(folder), "--set=training.lr=0.5", "--json", cwd=tmp_path, expect=3)
    assert json.loads(done.stdout)["error"]["kind"] == "not_resumable"


def test_two_processes_cannot_share_a_run(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fedcil", "run", "digits_fedavg", *SMALL, "--set=training.rounds=400"]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL) as process:
        folder = wait_for_metrics(tmp_path / "runs", process)
        done = call("resume", str(folder), "--json", cwd=tmp_path, expect=3)
        process.send_signal(signal.SIGKILL)
    assert json.loads(done.stdout)["error"]["kind"] == "folder_busy"


def test_a_foreign_client_package_is_named(tmp_path: Path) -> None:
    intruder = tmp_path / "client"
    intruder.mkdir()
    (intruder / "__init__.py").write_text("")
    done = call("list", cwd=tmp_path, expect=2)  # python -m puts the folder it is started in first
    assert str(intruder) in done.stderr
    code = "import fedcil; fedcil.run('digits_fedavg')"
    words = [sys.executable, "-c", code]
    library = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "InputError" in library.stderr


def wait_for_metrics(output: Path, process: subprocess.Popen[str] | subprocess.Popen[bytes]) -> Path:
    """The run folder, as soon as a first round is in it."""
    for _ in range(600):
        assert process.poll() is None, "the run ended too early"
        for path in output.glob("*/metrics.jsonl"):
            if path.stat().st_size:
                return path.parent
        time.sleep(0.1)
    raise AssertionError("no round in a minute")


@pytest.mark.parametrize("seconds", ["inf", "nan", "1e300", "-1"])
def test_a_limit_that_is_no_number_of_seconds_is_refused(seconds: str, tmp_path: Path) -> None:
    assert "--max-seconds" in call("run", "digits_fedavg", f"--max-seconds={seconds}", cwd=tmp_path, expect=2).stderr


@pytest.mark.parametrize("days", ["1e9", "nan"])
def test_certificates_for_too_long_are_refused(days: str, tmp_path: Path) -> None:
    done = call("deploy", "pki", "keys", "--host=localhost", f"--days={days}", cwd=tmp_path, expect=2)
    assert "--days" in done.stderr


def test_a_run_says_what_a_plan_says_and_no_other_runs_before(tmp_path: Path) -> None:
    (tmp_path / "good.toml").write_text(TINY.read_text())
    (tmp_path / "bad.toml").write_text(TINY.read_text() + "[availability]\nname = 'trace'\nfile = 'none.csv'\n")
    planned = call("plan", "bad.toml", cwd=tmp_path, expect=2).stderr
    assert call("run", "good.toml", "bad.toml", cwd=tmp_path, expect=2).stderr == planned
    assert not (tmp_path / "runs").exists()
    many = ("tiny.toml", "--set=clients.count=4000")
    (tmp_path / "tiny.toml").write_text(TINY.read_text())
    refused = [call(command, *many, cwd=tmp_path, expect=2).stderr for command in ("plan", "run")]
    assert refused[0] == refused[1]


def test_a_plan_says_who_cannot_fill_a_batch_and_plans_no_more_images_than_there_are(tmp_path: Path) -> None:
    words = ("plan", str(TINY), "--json", "--set=training.batches=drop_last", "--set=training.batch_size=1000000")
    plan = json.loads(call(*words, cwd=tmp_path).stdout)
    assert "4 of 4 clients have fewer samples of a task than training.batch_size = 1000000" in plan["notes"][0]
    assert plan["predicted_memory_mb"] < 1000
    by_statistics = json.loads(call(*words, "--set=method.name=afcl", cwd=tmp_path).stdout)
    assert not any("drop_last" in note for note in by_statistics["notes"])


def test_a_scenario_that_an_editor_has_marked_as_unicode(tmp_path: Path) -> None:
    (tmp_path / "marked.toml").write_text(TINY.read_text(), encoding="utf-8-sig")
    call("plan", "marked.toml", cwd=tmp_path)
