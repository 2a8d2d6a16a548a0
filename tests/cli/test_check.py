"""`stillnorm check` promises: the library's report, and exit codes that a pipeline can rely on."""

from __future__ import annotations

import json

import pytest

from stillnorm.diagnosis import CODES, Fix


def test_check_prints_the_report_and_fails_on_an_error(run):
    result = run("check", "net.py:make", "--data", "net.py:val", "--score", "net.py:accuracy")
    assert result.exit_code == 1
    assert "error[SN201] shared-layer" in result.stdout
    assert "eval (running statistics)" in result.stdout


def test_check_of_a_healthy_model_is_0(run):
    assert run("check", "net.py:healthy").exit_code == 0


def test_check_as_json(run):
    result = run("check", "net.py:zero_momentum", "--format", "json")
    assert result.exit_code == 1
    assert [f["code"] for f in json.loads(result.stdout)["findings"]] == ["SN002"]


@pytest.mark.parametrize(
    ("fail_on", "code"), [("error", 1), ("warning", 1), ("info", 1), ("never", 0)]
)
def test_fail_on(run, fail_on, code):
    assert run("check", "net.py:zero_momentum", "--fail-on", fail_on).exit_code == code


def test_a_warning_fails_only_when_asked_to(run, project):
    (project / "keras.py").write_text(
        "from torch import nn\nnet = nn.Sequential(nn.BatchNorm2d(3, momentum=0.99))\n"
    )
    assert "warning[SN108]" in run("check", "keras.py:net").stdout
    assert run("check", "keras.py:net").exit_code == 0
    assert run("check", "keras.py:net", "--fail-on", "warning").exit_code == 1


def test_select_and_ignore(run, fails):
    assert run("check", "net.py:zero_momentum", "--ignore", "SN002").exit_code == 0
    assert run("check", "net.py:zero_momentum", "--select", "SN1").exit_code == 0
    assert run("check", "net.py:zero_momentum", "--select", "SN1,SN002").exit_code == 1
    assert "no rule is called 'SN9'" in fails("check", "net.py:make", "--select", "SN9")[0]


def test_a_score_needs_data(run):
    result = run("check", "net.py:make", "--score", "net.py:accuracy")
    assert result.exit_code == 2
    assert "--score needs --data" in result.stderr


def test_a_rule_that_crashed_is_never_clean(run, monkeypatch):
    def crash(self, evidence):
        raise ZeroDivisionError

    monkeypatch.setattr(CODES["SN002"], "find", crash)
    assert run("check", "net.py:healthy").exit_code == 3


# -------------------------------------------------------------------- what a user can give


def test_predict_train_step_and_optimizer_reach_the_library(run, project):
    (project / "steps.py").write_text(
        "import torch\n"
        "def predict(model, batch):\n"
        "    print('predicting')\n"
        "    return model.train()(batch[0])\n"
        "def step(model, batch, optimizer):\n"
        "    print('stepping', type(optimizer).__name__)\n"
        "    model.train()(batch[0]).sum().backward()\n"
        "def sgd(model):\n"
        "    return torch.optim.SGD(model.parameters(), lr=0.1)\n"
    )
    given = ("--predict", "steps.py:predict", "--train-step", "steps.py:step")
    result = run(
        "check", "net.py:make", "--data", "net.py:val", *given, "--optimizer", "steps.py:sgd"
    )
    assert result.exit_code == 1
    assert "error[SN006]" in result.stdout
    assert "predicting" in result.stderr
    assert "stepping SGD" in result.stderr
    assert "--train-step" not in result.stdout


@pytest.mark.parametrize("option", ["--score", "--predict", "--train-step"])
def test_functions_of_batches_need_data(run, option):
    result = run("check", "net.py:make", option, "net.py:accuracy")
    assert result.exit_code == 2
    assert f"{option} needs --data" in result.stderr


def test_an_optimizer_that_is_none(fails):
    given = ("--data", "net.py:val", "--optimizer", "net.py:net_itself")
    assert "there is no 'net_itself'" in fails("check", "net.py:make", *given)[0]
    fact, _ = fails("check", "net.py:healthy", "--optimizer", "net.py:one_argument")
    assert fact == "net.py:one_argument returns float, not a torch.optim.Optimizer"


def test_a_step_of_other_arguments(fails):
    given = ("--data", "net.py:val", "--train-step", "net.py:one_argument")
    fact, _ = fails("check", "net.py:make", *given)
    assert fact.endswith("is called with (model, batch, optimizer)")


def test_batches_that_can_be_read_once_are_read_once(run, project):
    (project / "once.py").write_text(
        "import net\ndef val():\n    print('read')\n    yield from net.val()\n"
    )
    result = run("check", "net.py:make", "--data", "once.py:val", "--fix", "--unsafe-fixes")
    assert "1 fixed: SN201" in result.stdout
    assert "4 batches of 16" in result.stdout
    assert result.stderr.splitlines().count("read") == 1


def test_extend_select_adds_a_preview_rule(run):
    preview = next(rule.slug for rule in CODES.values() if rule.preview)
    code = next(code for code, rule in CODES.items() if rule.slug == preview)

    def considered(*args):
        report = json.loads(run("check", "net.py:healthy", "--format", "json", *args).stdout)
        return {*report["ran"], *(missed["code"] for missed in report["not_run"])}

    default = considered()
    assert code not in default
    assert considered("--extend-select", preview) == default | {code}
    assert considered("--select", "SN002", "--extend-select", code) == {"SN002", code}


# ------------------------------------------------------------------------------------ fixes


def keras(project, *, momentum=0.99):
    (project / "keras.py").write_text(
        "from torch import nn\n"
        f"net = lambda: nn.Sequential(nn.BatchNorm2d(3, momentum={momentum}))\n"
    )


def test_fixes_are_applied_and_what_is_left_is_shown(run):
    given = ("check", "net.py:make", "--data", "net.py:val", "--score", "net.py:accuracy")
    safe = run(*given, "--fix")
    assert safe.exit_code == 1
    assert "error[SN201]" in safe.stdout
    assert "fixed" not in safe.stdout
    unsafe = run(*given, "--fix", "--unsafe-fixes")
    assert unsafe.exit_code == 0
    assert "1 fixed: SN201 (give each call a norm of its own)" in unsafe.stdout
    assert "Net: 2 BatchNorm2d" in unsafe.stdout
    assert "nothing is written: --out" in unsafe.stderr


def test_the_fixed_model_is_written(run, project):
    (project / "stale.py").write_text(
        "import net, torch\n"
        "def make():\n"
        "    torch.manual_seed(0)\n"
        "    model = net.healthy()\n"
        "    [model.train()(x) for x, _ in net.val() * 8]\n"
        "    model[1].running_mean += 5\n"
        "    return model\n"
    )
    given = ("check", "stale.py:make", "--data", "net.py:val", "--select", "SN105")
    assert run(*given).exit_code == 1
    result = run(*given, "--fix", "--unsafe-fixes", "--out", "fixed.safetensors")
    assert result.exit_code == 0
    assert "the fixed model: fixed.safetensors" in result.stderr
    assert "keys" not in result.stderr
    assert run(*given, "--weights", "fixed.safetensors").exit_code == 0


def test_a_file_says_when_its_keys_are_not_those_of_the_code(run):
    given = ("check", "net.py:make", "--data", "net.py:val", "--fix", "--unsafe-fixes")
    result = run(*given, "--out", "fixed.safetensors")
    assert "its keys are not those of your code: 10 new (bn." in result.stderr
    assert "5 gone (bn.weight, bn.bias, bn.running_mean, ...)" in result.stderr


def test_what_no_tensor_holds_is_said(run, project):
    keras(project)
    result = run("check", "keras.py:net", "--fix", "--unsafe-fixes", "--out", "fixed.safetensors")
    assert "1 fixed: SN108" in result.stdout
    assert "so not in the file: momentum" in result.stderr
    assert "after loading it: set momentum m to 1 - m" in result.stderr


def test_a_hold_is_repeated_in_the_code(run, project):
    (project / "eval.py").write_text(
        "from torch import nn\n"
        "def make():\n"
        "    net = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.BatchNorm2d(3))\n"
        "    net[2].eval()\n"
        "    return net\n"
    )
    given = ("check", "eval.py:make", "--select", "SN003", "--fix")
    result = run(*given, "--out", "fixed.safetensors")
    assert "1 fixed: SN003 (hold the statistics)" in result.stdout
    assert "help: after loading it: sn.freeze(model, '2'" in result.stderr
    assert "warning: frozen with statistics that were never estimated" in result.stderr


def test_what_a_fix_uncovers_is_fixed_too(run, project, monkeypatch):
    """A rule that looks only once SN108 is gone, as a symptom does when its cause goes."""
    keras(project)
    look = CODES["SN002"].find

    def find(self, evidence):
        yield from look(self, evidence)
        layer = evidence.layers[0]
        if layer.momentum == pytest.approx(0.01) and layer.hold is None:
            fix = Fix("hold it", "unsafe", "freeze", (layer.path,))
            yield self.finding((layer.path,), "uncovered", fix=fix)

    monkeypatch.setattr(CODES["SN002"], "find", find)
    result = run("check", "keras.py:net", "--fix", "--unsafe-fixes")
    assert "2 fixed: SN108 (momentum -> 1 - momentum), SN002 (hold it)" in result.stdout
    assert "uncovered" not in result.stdout


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--unsafe-fixes",), "--unsafe-fixes needs --fix"),
        (("--out", "a.safetensors"), "--out needs --fix"),
        (("--fix", "--out", "a.pt"), "written as .safetensors only"),
        (("--fix", "--out", "none/a.safetensors"), "there is no folder none"),
        (("--output", "none/a.html"), "there is no folder none"),
        (("--write-baseline", "none/a.json"), "there is no folder none"),
        (("--fix", "--write-baseline", "a.json"), "first the one, then the other"),
    ],
)
def test_options_that_do_not_go_together(run, project, args, said):
    result = run("check", "net.py:zero_momentum", *args)
    assert result.exit_code == 2
    assert said in result.stderr
    assert {path.name for path in project.iterdir()} <= {"net.py", "__pycache__"}


# --------------------------------------------------------------------------------- baseline


def test_a_baseline_is_written_then_only_new_faults_count(run, project):
    written = run("check", "net.py:zero_momentum", "--write-baseline", "known.json")
    assert written.exit_code == 0
    assert "1 finding suppressed by known.json" in written.stdout
    assert json.loads((project / "known.json").read_text())["models"] == {
        "Sequential": {"SN002": ["1"]}
    }
    assert run("check", "net.py:zero_momentum", "--baseline", "known.json").exit_code == 0
    keras(project, momentum=0.0)
    assert run("check", "keras.py:net", "--baseline", "known.json").exit_code == 1


def test_a_baseline_that_has_more_than_there_is_says_so(run):
    run("check", "net.py:zero_momentum", "--write-baseline", "known.json")
    result = run("check", "net.py:healthy", "--baseline", "known.json")
    assert result.exit_code == 0
    assert "known.json: 1 fault of it is gone (SN002 1)" in result.stderr
    assert "--write-baseline known.json takes them out" in result.stderr
    assert (
        run("check", "net.py:healthy", "--write-baseline", "known.json").stderr.count("gone") == 0
    )
    assert "gone" not in run("check", "net.py:healthy", "--baseline", "known.json").stderr


def test_a_baseline_must_be_there(fails):
    fact, help = fails("check", "net.py:healthy", "--baseline", "none.json")
    assert fact == "none.json cannot be read: No such file or directory"
    assert help == "--write-baseline none.json makes one"


def test_known_faults_are_not_fixed(run, project):
    keras(project)
    run("check", "keras.py:net", "--write-baseline", "known.json")
    result = run("check", "keras.py:net", "--baseline", "known.json", "--fix", "--unsafe-fixes")
    assert "fixed" not in result.stdout


# ----------------------------------------------------------------------------------- output


@pytest.mark.parametrize(
    ("format", "start"),
    [
        ("text", "Sequential: 1 BatchNorm2d"),
        ("json", '{\n  "schema_version": 1'),
        ("markdown", "### Sequential: 1 BatchNorm2d"),
        ("github", "::error title=SN002 zero-momentum-freeze::momentum 0"),
        ("html", "<!doctype html>"),
    ],
)
def test_formats(run, format, start):
    result = run("check", "net.py:zero_momentum", "--format", format)
    assert result.stdout.lower().startswith(start.lower())
    assert result.exit_code == 1


def test_reports_are_written_beside_what_is_shown(run, project):
    files = ("r.html", "r.json", "r.md", "r.txt")
    given = [arg for name in files for arg in ("--output", name)]
    result = run("check", "net.py:zero_momentum", "--format", "github", *given)
    assert result.stdout.startswith("::error")
    starts = [(project / name).read_text()[:15].lower() for name in files]
    assert starts[0].startswith("<!doctype html>")
    assert starts[1].startswith("{\n")
    assert starts[2].startswith("### sequential")
    assert starts[3].startswith("sequential: 1")


def test_what_a_file_has_taken_is_not_shown_again(run, project):
    result = run("check", "net.py:zero_momentum", "--format", "json", "--output", "r.json")
    assert result.stdout.startswith("Sequential: 1 BatchNorm2d")
    assert json.loads((project / "r.json").read_text())["schema_version"] == 1
    run("check", "net.py:zero_momentum", "--format", "json", "--output", "report")
    assert json.loads((project / "report").read_text())["schema_version"] == 1


def test_annotations_are_relative_to_the_workspace(run, project, monkeypatch):
    given = ("check", "net.py:make", "--data", "net.py:val", "--format", "github")
    assert run(*given).stdout.startswith("::error file=net.py,line=")
    monkeypatch.setenv("GITHUB_WORKSPACE", str(project.parent))
    assert run(*given).stdout.startswith(f"::error file={project.name}/net.py,line=")


def test_a_clean_model_has_no_annotations(run):
    assert run("check", "net.py:healthy", "--format", "github").stdout == ""


def test_a_fault_that_the_configuration_hides_too_is_not_gone(run, project):
    run("check", "net.py:zero_momentum", "--write-baseline", "known.json")
    (project / "pyproject.toml").write_text('[tool.stillnorm.per-path-ignores]\n"*" = ["SN002"]\n')
    result = run("check", "net.py:zero_momentum", "--baseline", "known.json")
    assert (result.exit_code, "gone" in result.stderr) == (0, False)


# ------------------------------------------------------------------- what stays as it was


def test_what_the_model_prints_is_never_in_the_report(run, project):
    (project / "loud.py").write_text(
        "import net\n"
        "class Loud(net.Net):\n"
        "    def forward(self, x):\n"
        "        print('forward')\n"
        "        return super().forward(x)\n"
        "    def state_dict(self, *args, **kwargs):\n"
        "        print('state')\n"
        "        return super().state_dict(*args, **kwargs)\n"
    )
    page = ("--output", "a.html", "--format", "json")
    result = run("check", "loud.py:Loud", "--data", "net.py:val", *page)
    assert json.loads(result.stdout)["model"] == "Loud"
    assert {"forward", "state"} <= set(result.stderr.splitlines())
    assert "<html" in (project / "a.html").read_text()


@pytest.mark.parametrize(
    "other",
    [
        ("net.py:healthy",),
        ("torch.nn:Flatten", "--data", "net.py:val"),
        ("net.py:healthy", "--baseline", "net.py"),
        ("net.py:healthy", "--write-baseline", "page.html"),
        ("net.py:healthy", "--fix", "--out", "new.safetensors"),
    ],
)
def test_the_report_takes_the_place_of_nothing_that_was_named(run, project, other):
    before = (project / "net.py").read_bytes()
    target = "new.safetensors" if "--out" in other else "net.py"
    (project / "page.html").symlink_to(project / target)
    result = run("check", *other, "--output", "page.html")
    assert result.exit_code == 2
    assert "a report must not take its place" in result.stderr
    assert (project / "net.py").read_bytes() == before


def test_any_number_of_batches_can_be_asked_for(run, project):
    (project / "stream.py").write_text("import net\ndef batches():\n    yield from net.val()\n")
    more = ("--max-batches", str(10**30))
    assert run("check", "net.py:healthy", "--data", "stream.py:batches", *more).exit_code == 0
    assert run("check", "net.py:healthy", "--data", "net.py:val", *more).exit_code == 0
