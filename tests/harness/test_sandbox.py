# SPDX-License-Identifier: Apache-2.0
"""Fresh processes hold what they promise: empty, cut off, bounded, and no child takes the harness down."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import harness.sandbox
from harness.errors import Mismatch
from harness.sandbox import Answer, Sandbox, SandboxFailure, jobs, models

PACKAGE = "sandbox_tiny_model"
HARNESS = Path(harness.sandbox.__file__).parents[1]
IDS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
INPUTS = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}

CONFIGURATION = """
from transformers import PretrainedConfig


class TinyConfig(PretrainedConfig):
    model_type = "sandbox_tiny"

    def __init__(self, vocab_size=13, hidden_size=8, tie_word_embeddings=True, **kwargs):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = 1
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)
"""

MODELING = """
import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput

from .configuration_tiny import TinyConfig


class TinyPreTrainedModel(PreTrainedModel):
    config_class = TinyConfig

    def __init__(self, config):
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.hidden_size)
        self.up = nn.Linear(config.hidden_size, config.hidden_size)

    def get_input_embeddings(self):
        return self.wte


class TinyModel(TinyPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.post_init()

    def forward(self, input_ids, attention_mask=None):
        return BaseModelOutput(last_hidden_state=torch.tanh(self.up(self.wte(input_ids))))


class TinyForCausalLM(TinyPreTrainedModel, GenerationMixin):
    # The two lines of transformers want it written differently.
    _tied_weights_keys = TIED

    def __init__(self, config):
        super().__init__(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        # more of __init__
        self.post_init()

    def get_output_embeddings(self):
        return self.lm_head

    def prepare_inputs_for_generation(self, input_ids, attention_mask=None, **kwargs):
        return {"input_ids": input_ids, "attention_mask": attention_mask}

    def forward(self, input_ids, attention_mask=None, shift=0.0, **kwargs):
        hidden = torch.cumsum(torch.tanh(self.up(self.wte(input_ids))), dim=1)
        # more of forward
        return CausalLMOutput(logits=self.lm_head(hidden) + shift)
"""

Variant = Callable[..., str]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A source tree with the package of the tiny model, importable here."""
    tree = tmp_path_factory.mktemp("source-tree")
    package = tree / PACKAGE
    package.mkdir()
    version_5 = int(transformers.__version__.split(".")[0]) >= 5
    tied = '{"lm_head.weight": "wte.weight"}' if version_5 else '["lm_head.weight"]'
    (package / "__init__.py").write_text("SECRET = 'source'\n")
    (package / "configuration_tiny.py").write_text(CONFIGURATION)
    (package / "modeling_tiny.py").write_text(MODELING.replace("TIED", tied))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(tree)
        yield tree
    for name in [name for name in sys.modules if name.split(".")[0] == PACKAGE]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def model(source: Path) -> Any:
    """The tiny model in float64, built from the source tree."""
    configuration = importlib.import_module(f"{PACKAGE}.configuration_tiny")
    modeling = importlib.import_module(f"{PACKAGE}.modeling_tiny")
    configuration.TinyConfig.register_for_auto_class()
    modeling.TinyForCausalLM.register_for_auto_class("AutoModelForCausalLM")
    torch.manual_seed(0)
    return modeling.TinyForCausalLM(configuration.TinyConfig()).to(torch.float64).eval()


@pytest.fixture(scope="module")
def saved(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model as `save_pretrained` leaves it, code included."""
    directory = tmp_path_factory.mktemp("saved") / "tiny"
    model.save_pretrained(directory)
    return directory


@pytest.fixture
def variant(saved: Path, tmp_path: Path) -> Variant:
    """Copies of the saved directory with lines put into the modeling file."""

    def make(*, at_import: str = "", in_init: str = "", in_forward: str = "", name: str = "tiny") -> str:
        directory = tmp_path / name
        shutil.copytree(saved, directory)
        file = directory / "modeling_tiny.py"
        code = file.read_text()
        for mark, lines in (("# more of __init__", in_init), ("# more of forward", in_forward)):
            code = code.replace(mark, lines)
        file.write_text(textwrap.dedent(at_import) + code)
        return str(directory)

    return make


@pytest.fixture(scope="module")
def user_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stands for the home of the user who starts the sandbox."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory, user_home: Path) -> Iterator[Sandbox]:
    """One server for all tests of this module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(user_home))
        patch.setenv("HF_HOME", str(user_home / "hf"))
        patch.setenv("HF_TOKEN", "secret")
        with Sandbox(tmp_path_factory.mktemp("root"), memory_limit_bytes=1 << 30) as opened:
            yield opened


@pytest.fixture
def run(sandbox: Sandbox, source: Path) -> Callable[..., Answer]:
    """Runs a directory with the source tree and the harness hidden."""

    def run_directory(directory: str | Path, **changes: Any) -> Answer:
        options = {key: changes.pop(key) for key in ("poisoned_memory", "cache") if key in changes}
        request = {"directory": str(directory), "dtype": "float64", **changes}
        return sandbox.run("load_and_run", request, tensors=INPUTS, hidden_paths=[source, HARNESS], **options)

    return run_directory


def failure(run: Callable[..., Answer], directory: str | Path, **changes: Any) -> SandboxFailure:
    """The failure of a run, which has to be one line and must not hurt the next run."""
    with pytest.raises(SandboxFailure) as caught:
        run(directory, **changes)
    assert isinstance(caught.value, Mismatch)
    assert "\n" not in str(caught.value)
    return caught.value


def is_alive(process: int) -> bool:
    """Whether a process runs; a dead one that nobody has collected yet does not."""
    shown = subprocess.run(["ps", "-o", "stat=", "-p", str(process)], capture_output=True, text=True, check=False)
    return shown.returncode == 0 and not shown.stdout.strip().startswith("Z")


def wait_until(condition: Callable[[], bool], *, seconds: float = 60) -> bool:
    """Whether the condition comes true in time."""
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


# What a job answers


def test_importing_the_client_does_not_import_torch() -> None:
    code = "import sys, harness.sandbox; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    path = os.pathsep.join([str(HARNESS.parent), os.environ.get("PYTHONPATH", "")])
    assert subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}).returncode == 0


def test_outputs_equal_the_local_ones(run: Callable[..., Answer], saved: Path, model: Any) -> None:
    tied = [["lm_head.weight", "wte.weight"], ["lm_head.weight", "up.weight"], ["wte.weight", "nowhere"]]
    answer = run(saved, forward={"shift": 0.25}, tied=tied, return_state=True, generate={"max_new_tokens": 3})
    with torch.no_grad():
        torch.testing.assert_close(answer.tensors["output.logits"], model(**INPUTS).logits + 0.25, rtol=0, atol=0)
        generated = model.generate(**INPUTS, max_new_tokens=3)
    assert torch.equal(answer.tensors["generated.sequences"], generated)
    for name, tensor in model.state_dict().items():
        assert torch.equal(answer.tensors[f"state.{name}"], tensor)

    values = answer.values
    assert values["loading"]["missing_keys"] == values["loading"]["unexpected_keys"] == []
    assert values["loading"]["mismatched_keys"] == []
    assert (values["class"], values["loading"]["config_class"]) == ("TinyForCausalLM", "TinyConfig")
    assert values["module"].startswith("transformers_modules.")
    assert values["file"].startswith(values["process"]["module_cache"])
    assert [group["same_tensor"] for group in values["tied"]] == [True, False, False]
    assert values["tied"][2]["missing"] == ["nowhere"]
    described = values["parameters"]["up.weight"]
    assert (described["shape"], described["dtype"], described["finite"]) == ([8, 8], "float64", True)
    assert described["checksum"] == models.checksum(model.up.weight)
    assert values["outputs"] == {"logits": "Tensor"}
    assert answer.seconds > 0


def test_an_encoder_without_a_head(run: Callable[..., Answer], saved: Path, model: Any, tmp_path: Path) -> None:
    directory = tmp_path / "encoder"
    shutil.copytree(saved, directory)
    config = json.loads((directory / "config.json").read_text())
    config["auto_map"]["AutoModel"] = "modeling_tiny.TinyModel"
    (directory / "config.json").write_text(json.dumps(config))
    answer = run(directory, auto_class="AutoModel")
    expected = torch.tanh(model.up(model.wte(IDS)))
    torch.testing.assert_close(answer.tensors["output.last_hidden_state"], expected, rtol=0, atol=0)


def test_saving_from_a_fresh_process_carries_the_code(run: Callable[..., Answer], saved: Path, tmp_path: Path) -> None:
    first = run(saved, resave=str(tmp_path / "again"))
    assert {"config.json", "modeling_tiny.py", "configuration_tiny.py", "model.safetensors"} <= set(
        first.values["resaved"]
    )
    second = run(tmp_path / "again")
    assert torch.equal(first.tensors["output.logits"], second.tensors["output.logits"])


def test_an_exception_names_the_line_of_the_remote_code(run: Callable[..., Answer], variant: Variant) -> None:
    caught = failure(run, variant(in_forward="raise KeyError('nothing\\n here')"))
    assert (caught.kind, caught.exception) == ("exception", "KeyError")
    assert "loading and running it in a fresh process raised KeyError" in str(caught)
    assert "(modeling_tiny.py, line " in str(caught)
    assert "Traceback" in caught.output


def test_what_cannot_be_asked_is_refused_here(sandbox: Sandbox, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no job 'lod_and_run'; known: load_and_run, load_two"):
        sandbox.run("lod_and_run", {})
    with pytest.raises(RuntimeError, match="with statement"):
        Sandbox(tmp_path).run("load_and_run", {})


def test_a_module_that_cannot_be_preloaded_is_named(tmp_path: Path) -> None:
    with (
        Sandbox(tmp_path, preload=["no_such_module"]) as opened,
        pytest.raises(harness.errors.ParityError, match="cannot preload module 'no_such_module'"),
    ):
        opened.run("load_and_run", {"directory": "anywhere"})


@pytest.mark.parametrize("cold", [False, True])
def test_a_server_may_get_ready_in_the_background(tmp_path: Path, variant: Variant, cold: bool) -> None:
    directory = variant()
    with Sandbox(tmp_path) as opened:
        opened.begin_warm_up()
        opened.begin_warm_up()
        run = opened.run_cold if cold else opened.run
        for _ in range(2):
            answer = run("load_and_run", {"directory": directory}, tensors=INPUTS)
            assert "output.logits" in answer.tensors
        opened.restart()
        opened.begin_warm_up()  # and nobody waits for it


def test_a_module_that_cannot_be_preloaded_in_the_background_is_named_by_the_first_job(tmp_path: Path) -> None:
    with Sandbox(tmp_path, preload=["no_such_module"]) as opened:
        opened.begin_warm_up()
        with pytest.raises(harness.errors.ParityError, match="cannot preload module 'no_such_module'"):
            opened.run("load_and_run", {"directory": "anywhere"})


# Fresh


def test_a_given_cache_goes_from_job_to_job_and_to_another_sandbox(
    run: Callable[..., Answer], variant: Variant, sandbox: Sandbox, tmp_path: Path
) -> None:
    code = """
        import os
        mark = open(os.path.join(os.environ["HF_HOME"], "mark"), "a")
        mark.write("x")
        mark.close()
        offline = os.environ.get("HF_HUB_OFFLINE") == "1"
        if open(mark.name).read() == "xxx" and offline:
            raise ImportError("third, and offline")
        if os.environ.get("HF_ENDPOINT") == "http://127.0.0.1:9" and offline:
            raise ImportError("offline with a Hub")
        """
    directory, cache = variant(at_import=code), tmp_path / "cache"
    mark = cache / "mark"
    run(directory, cache=cache)
    assert mark.read_text() == "x"
    run(directory)
    assert mark.read_text() == "x"
    with Sandbox(tmp_path, endpoint="http://127.0.0.1:9") as other:
        other.run("load_and_run", {"directory": directory, "dtype": "float64"}, tensors=INPUTS, cache=cache)
    assert mark.read_text() == "xx"
    assert "third, and offline" in str(failure(run, directory, cache=cache))
    assert mark.read_text() == "xxx"


def test_every_job_finds_everything_empty(run: Callable[..., Answer], variant: Variant) -> None:
    litter = """
        import os, tempfile
        from pathlib import Path
        for folder in (".", os.environ["HOME"], os.environ["HF_HOME"], tempfile.gettempdir()):
            assert not os.listdir(folder), folder
            Path(folder, "litter").mkdir()
        os.chmod("litter", 0)
    """
    answers = [run(variant(at_import=litter, name=name)) for name in ("one", "two")]
    for answer in answers:
        assert answer.values["process"]["working_directory_files"] == []
        assert answer.values["process"]["module_cache_files"] == []
        assert answer.values["process"]["working_directory"] != os.getcwd()
    assert answers[0].values["process"]["pid"] != answers[1].values["process"]["pid"]


def test_the_user_and_their_tokens_stay_outside(
    run: Callable[..., Answer], variant: Variant, sandbox: Sandbox, user_home: Path
) -> None:
    code = "import os\nassert 'HF_TOKEN' not in os.environ\nassert os.environ['HF_HUB_OFFLINE'] == '1'\n"
    home = Path(run(variant(at_import=code)).values["process"]["home"])
    assert sandbox.root.resolve() in home.parents
    assert list(user_home.iterdir()) == []


def test_two_models_with_the_same_file_names(
    sandbox: Sandbox, variant: Variant, saved: Path, source: Path, model: Any
) -> None:
    other = variant(in_forward="hidden = hidden * 2", name="other")
    request = {"directories": [str(saved), other], "dtype": "float64", "both_orders": True}
    answer = sandbox.run("load_two", request, tensors=INPUTS, hidden_paths=[source, HARNESS])
    expected = model(**INPUTS).logits.detach()
    for prefix in ("", "reversed."):
        torch.testing.assert_close(answer.tensors[f"{prefix}first.output.logits"], expected)
        torch.testing.assert_close(answer.tensors[f"{prefix}second.output.logits"], expected * 2)
    assert answer.values["first"]["file"] != answer.values["second"]["file"]


# Cut off


def test_the_source_tree_cannot_be_imported(run: Callable[..., Answer], saved: Path) -> None:
    names = [PACKAGE, "harness", "harness.errors", "harness.sandbox.jobs", "json"]
    assert run(saved, hidden_modules=names).values["importable"] == ["json"]


def test_what_is_not_hidden_can_be_imported(sandbox: Sandbox, saved: Path) -> None:
    request = {"directory": str(saved), "dtype": "float64", "hidden_modules": ["harness"]}
    assert sandbox.run("load_and_run", request, tensors=INPUTS).values["importable"] == ["harness"]


@pytest.mark.parametrize(
    "reach",
    [
        "open({file!r})",
        "os.open({file!r}, os.O_RDONLY)",
        "os.listdir({tree!r})",
        "os.scandir({tree!r})",
        "os.chdir({tree!r})",
        "os.symlink({tree!r}, 'link'); open('link/" + PACKAGE + "/__init__.py')",
        "sys.path.append({tree!r}); importlib.import_module({package!r})",
    ],
)
def test_the_source_tree_cannot_be_read(run: Callable[..., Answer], variant: Variant, source: Path, reach: str) -> None:
    file = str(source / PACKAGE / "__init__.py")
    code = "import importlib, os, sys\n" + reach.format(file=file, tree=str(source), package=PACKAGE) + "\n"
    caught = failure(run, variant(at_import=code))
    assert caught.exception in ("PermissionError", "ModuleNotFoundError")
    if caught.exception == "PermissionError":
        assert "hidden source tree" in str(caught)


def test_a_saved_directory_inside_the_hidden_tree_can_be_read(sandbox: Sandbox, variant: Variant) -> None:
    directory = variant()
    request = {"directory": directory, "dtype": "float64"}
    answer = sandbox.run("load_and_run", request, tensors=INPUTS, hidden_paths=[Path(directory).parent])
    assert answer.values["class"] == "TinyForCausalLM"


def test_the_longest_prefix_decides_what_is_hidden() -> None:
    rule = jobs.hidden_rule(["/tree", "/tree/venv/package", "/same"], ["/tree/venv", "/same"])
    assert all(map(rule, ["/tree", "/tree/a.py", "/tree/venv/package/a.py", "/same/a.py"]))
    assert not any(map(rule, ["/tree/venv/a.py", "/treetop", "/"]))


def test_the_places_of_an_editable_install_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("__editable___finder")
    exec("MAPPING = {'package': '/tree/package'}\nclass Finder: pass", vars(module))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    assert jobs.mapped_paths(module.Finder) == jobs.mapped_paths(module.Finder()) == ["/tree/package"]
    assert jobs.mapped_paths(sys.meta_path[0]) == []


@pytest.mark.parametrize(
    "call",
    [
        "socket.create_connection(('192.0.2.1', 80), timeout=1)",
        "socket.getaddrinfo('huggingface.co', 443)",
        "socket.gethostbyname('huggingface.co')",
        "socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('192.0.2.1', 9))",
    ],
)
def test_the_network_is_refused(run: Callable[..., Answer], variant: Variant, call: str) -> None:
    caught = failure(run, variant(at_import=f"import socket\n{call}\n"))
    assert caught.exception == "PermissionError"
    assert "may use loopback only" in str(caught)


def test_loopback_is_allowed(run: Callable[..., Answer], variant: Variant) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        run(variant(at_import=f"import socket\nsocket.create_connection(('localhost', {port}), timeout=5).close()\n"))


# Poisoned memory


@pytest.mark.parametrize(
    "left_out",
    [
        "self.register_buffer('extra', torch.empty(13), persistent=False)",
        "self.extra = nn.Parameter(torch.empty(13))",
    ],
    ids=["buffer", "parameter"],
)
def test_memory_nobody_wrote_to_shows_as_nan(run: Callable[..., Answer], variant: Variant, left_out: str) -> None:
    directory = variant(in_init=left_out, in_forward="shift = shift + self.extra")
    answer = run(directory, poisoned_memory=True)
    assert answer.tensors["output.logits"].isnan().all()
    described = answer.values["buffers" if "buffer" in left_out else "parameters"]["extra"]
    assert not described["finite"]


def test_a_sound_model_is_unharmed_by_poison(run: Callable[..., Answer], saved: Path) -> None:
    plain, poisoned = run(saved), run(saved, poisoned_memory=True)
    assert torch.equal(plain.tensors["output.logits"], poisoned.tensors["output.logits"])


# Hostile children


@pytest.mark.parametrize(
    ("code", "kind", "message"),
    [
        ("os.write(2, b'last\\x1b[2J words\\n'); os._exit(3)", "exit", r"exited with status 3; .*: last \[2J words$"),
        ("os._exit(0)", "exit", "exited with status 0 and wrote no answer; it wrote nothing to standard error"),
        ("sys.exit(5)", "exception", "raised SystemExit: 5"),
        ("signal.raise_signal(signal.SIGKILL)", "signal", "was killed by SIGKILL"),
        ("ctypes.string_at(0)", "signal", "was killed by SIGSEGV"),
        ("time.sleep(1000)", "time", "was killed: it exceeded 2 s"),
        ("print('x' * 50_000_000); os._exit(4)", "exit", "exited with status 4"),
        ("[os.write(1, b'y' * 65536) for _ in itertools.count()]", "time", "it exceeded 2 s"),
        ("os.kill(os.getppid(), signal.SIGKILL)", "exception", "may signal its children only"),
        ("os.kill(-1, signal.SIGKILL)", "exception", "may signal its children only"),
        ("raise MemoryError", "exception", "MemoryError: without a message .*; the memory limit is 1 GiB"),
        ("answer({'values': 1}); os._exit(0)", "answer", "wrote an answer that cannot be read"),
        ("answer('[' * 100_000); os._exit(0)", "answer", "wrote an answer that cannot be read"),
        ("answer({'values': {}}, b'junk'); os._exit(0)", "answer", "answer.safetensors"),
        ("answer('x' * (17 << 20)); os._exit(0)", "answer", "more than the 16777216 allowed"),
        ("os.mkfifo(path('answer.json')); os._exit(0)", "answer", "not a regular file"),
        ("os.symlink('/etc/passwd', path('answer.json')); os._exit(0)", "answer", "cannot be read"),
    ],
)
def test_a_hostile_child_gives_one_message(
    sandbox: Sandbox, run: Callable[..., Answer], variant: Variant, saved: Path, code: str, kind: str, message: str
) -> None:
    tools = """
        import ctypes, itertools, json, os, signal, sys, time
        from pathlib import Path
        def path(name):
            [job] = Path(os.environ["HOME"]).parents[1].joinpath("jobs").iterdir()
            return job / name
        def answer(content, tensors=None):
            path("answer.json").write_text(content if isinstance(content, str) else json.dumps(content))
            if tensors is not None:
                path("answer.safetensors").write_bytes(tensors)
    """
    directory = variant(at_import=textwrap.dedent(tools) + code + "\n")
    with pytest.MonkeyPatch.context() as patch:
        if kind == "time":
            patch.setattr(sandbox, "time_limit_seconds", 2)
        caught = failure(run, directory)
    assert caught.kind == kind
    assert re.search(message, str(caught))
    assert len(caught.output) < 4 * jobs.KEPT_OUTPUT
    assert run(saved).values["class"] == "TinyForCausalLM"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux counts private memory against a limit")
@pytest.mark.parametrize(
    "code",
    ["kept = [bytearray(1 << 26) for _ in iter(int, 1)]", "kept = [torch.ones(1 << 24) for _ in iter(int, 1)]"],
)
def test_allocation_without_end_is_stopped(
    run: Callable[..., Answer], variant: Variant, saved: Path, code: str
) -> None:
    caught = failure(run, variant(at_import=f"import torch\n{code}\n"))
    assert str(caught).endswith("; the memory limit is 1 GiB")
    assert run(saved).values["class"] == "TinyForCausalLM"


@pytest.mark.parametrize("end", ["os._exit(3)", "time.sleep(1000)", "pass"])
def test_descendants_end_with_their_job(
    sandbox: Sandbox, run: Callable[..., Answer], variant: Variant, tmp_path: Path, end: str
) -> None:
    pids = tmp_path / "pids"
    escape = "os.setsid()" if sys.platform == "linux" else "pass"
    forking = f"""
        import os, time
        for number in range(20):
            if os.fork() == 0:
                if number % 2:
                    {escape}
                with open({str(pids)!r}, "a") as file:
                    file.write(f"{{os.getpid()}}\\n")
                time.sleep(1000)
        while not os.path.exists({str(pids)!r}) or len(open({str(pids)!r}).readlines()) < 20:
            time.sleep(0.01)
        {end}
    """
    directory = variant(at_import=forking)
    with pytest.MonkeyPatch.context() as patch:
        if end.startswith("time"):
            patch.setattr(sandbox, "time_limit_seconds", 3)
        if end == "pass":
            run(directory)
        else:
            failure(run, directory)
    assert [pid for pid in map(int, pids.read_text().split()) if is_alive(pid)] == []


def test_a_dead_server_is_replaced(sandbox: Sandbox, run: Callable[..., Answer], saved: Path) -> None:
    # What a child that calls the system directly, past the guards, could do.
    assert sandbox._server is not None
    sandbox._server.kill()
    sandbox._server.wait()
    assert run(saved).values["class"] == "TinyForCausalLM"


def test_nothing_outlives_a_killed_parent(variant: Variant, tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    sleeping = f"""
        import os, time
        if os.fork() == 0:
            os.setsid()
        with open({str(pids)!r}, "a") as file:
            file.write(f"{{os.getpid()}} {{os.getppid()}}\\n")
        time.sleep(1000)
    """
    directory = variant(at_import=sleeping)
    client = f"""
        import pathlib, sys
        sys.path.append({str(HARNESS.parent)!r})
        from harness.sandbox import Sandbox
        with Sandbox(pathlib.Path({str(tmp_path)!r})) as sandbox:
            sandbox.run_cold("load_and_run", {{"directory": {directory!r}}})
    """
    parent = subprocess.Popen([sys.executable, "-c", textwrap.dedent(client)])
    try:
        assert wait_until(lambda: pids.exists() and len(pids.read_text().split()) == 4)
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    started = set(map(int, pids.read_text().split()))
    assert len(started) == 3  # Server, child, grandchild.
    assert wait_until(lambda: not any(map(is_alive, started)), seconds=10)


# Cold


def test_a_cold_interpreter_answers_the_same(
    sandbox: Sandbox, run: Callable[..., Answer], saved: Path, source: Path
) -> None:
    warm = run(saved, tied=[["lm_head.weight", "wte.weight"]])
    request = {"directory": str(saved), "dtype": "float64", "tied": [["lm_head.weight", "wte.weight"]]}
    request["hidden_modules"] = [PACKAGE, "harness", "harness.sandbox.jobs"]
    cold = sandbox.run_cold("load_and_run", request, tensors=INPUTS, hidden_paths=[source, HARNESS])
    assert torch.equal(cold.tensors["output.logits"], warm.tensors["output.logits"])
    assert cold.values["importable"] == []
    for values in (warm.values, cold.values):
        del values["process"]["pid"]
    assert cold.values == warm.values


def test_the_folder_goes_with_the_sandbox(tmp_path: Path) -> None:
    with Sandbox(tmp_path) as opened:
        assert list(tmp_path.iterdir())
        opened._start()
    assert list(tmp_path.iterdir()) == []
