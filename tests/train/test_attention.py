"""The choice between XLA's attention and the Pallas kernels, which are interpreted here.

The devices pass for TPUs where a test says so. The kernels are broken on purpose to see that the choice notices.
"""

import json
import re
import shutil
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from lit_fast.cli.main import main
from lit_fast.config import Config, LossConfig, StreamConfig, TextConfig
from lit_fast.errors import UserError
from lit_fast.models import packed_attention
from lit_fast.models.text_tower import TextTower
from lit_fast.models.two_towers import init_params
from lit_fast.runs.run import open_run
from lit_fast.runtime import batch_sharding, make_mesh
from lit_fast.train import attention, step_builder
from lit_fast.train.attention import (
    TOLERANCES,
    AttentionChoice,
    compare_attention,
    compile_kernels,
    gradient_differences,
    propose_attention,
    with_kernels,
    write_attention,
)
from lit_fast.train.input_pipeline.packing import Packing
from lit_fast.train.step import abstract_training, init_state
from tests.synthetic import make_dataset

TEXT = TextConfig(width=32, depth=2, heads=1, mlp_dim=32, pack=8, keep="hidden", dtype="bfloat16")
TRUE_LENGTHS = replace(TEXT, mask_padding=True, row_tokens=128, rows=3)
PENDING = AttentionChoice("pallas", pending=True)
EOS, CAPTIONS, WIDTH = 1, 32, 24


def build(text):
    return TextTower(
        text.shape,
        50,
        16,
        WIDTH,
        eos_id=EOS if text.mask_padding else None,
        pack=text.pack,
        dtype=jnp.dtype(text.dtype),
    )


def training(text):
    """Return configuration, mesh, state and batch before the first step."""
    config = Config(steps=10, text=text, loss=LossConfig(tile=16), stream=StreamConfig(global_batch=CAPTIONS))
    config = replace(config, optimizer=replace(config.optimizer, warmup_steps=1))
    mesh = make_mesh(jax.devices()[:1])
    optimizer, _ = abstract_training(build(text), config)
    state = init_state(init_params(build(text), config, np.zeros(WIDTH, np.float32)), optimizer, mesh)
    rng = np.random.default_rng(0)
    ids = rng.integers(2, 50, (CAPTIONS, 16)).astype(np.uint16)
    ids[np.arange(16) >= rng.integers(1, 17, CAPTIONS)[:, None]] = EOS
    images = rng.normal(size=(CAPTIONS, WIDTH)).astype(ml_dtypes.bfloat16)
    batch = {"images": images, "ids": ids, "rows": np.arange(CAPTIONS, dtype=np.int32)}
    if text.packed:
        batch = Packing(text, CAPTIONS, EOS, 9.0, 1, 1)(batch)
    batch = {name: jax.device_put(array, batch_sharding(mesh)) for name, array in batch.items()}
    return SimpleNamespace(config=config, mesh=mesh, state=state, batch=batch)


# Without optimized machine code compiling takes half the time. XLA's form is compiled once.
QUICK = {"xla_backend_optimization_level": 0}
xla_programs = {}


def quick(program, text):
    def compile(*arguments):
        if text.attention == "pallas":
            return program.lower(*arguments).compile(QUICK)
        if text not in xla_programs:
            xla_programs[text] = program.lower(*arguments).compile(QUICK)
        return xla_programs[text]

    return SimpleNamespace(lower=lambda *arguments: SimpleNamespace(compile=lambda: compile(*arguments)))


@pytest.fixture
def compare(monkeypatch):
    """Compare the forms on a batch."""
    make = attention.forward_and_backward
    monkeypatch.setattr(
        attention, "forward_and_backward", lambda config, text, *rest: quick(make(config, text, *rest), text)
    )

    def compare(choice=PENDING, text=TEXT):
        t = training(text)
        return compare_attention(choice, t.config, text, build, t.mesh, t.state, t.batch)

    return compare


def broken_after(kernel, change):
    """Return a kernel that changes its outputs after it has computed them."""

    def broken(*refs, **options):
        kernel(*refs, **options)
        change(refs)

    return broken


def set_nan(refs):
    refs[-1][0, 0, 0] = jnp.nan


def damage_last_row(refs):
    """Damage one of many rows; a norm over all embeddings would hardly change."""
    y = refs[-1]
    row = packed_attention.pl.program_id(0)
    y[0] = y[0] * jnp.where(row == packed_attention.pl.num_programs(0) - 1, 0.0, 1.0).astype(y.dtype)


def halve_key_gradients(refs):
    dqkv = refs[-3]
    dqkv[0, 32:64, :] = dqkv[0, 32:64, :] * 0.5


def raise_error(refs):
    raise NotImplementedError("no lowering\nof this")


def test_forms_that_agree_give_the_kernels(compare, capsys):
    choice = compare()
    assert (choice.form, choice.why, choice.pending) == ("pallas", "", False)
    assert choice.differences.keys() == TOLERANCES.keys()
    # Two forms that round to bfloat16 at the same places; measured are 0.01 and less.
    assert 0 < choice.differences["gradient"] < 0.03
    assert 0 < choice.differences["embedding"] < 0.02
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("attention: Pallas kernels; largest differences from XLA's form: embedding 0.0")


@pytest.fixture
def tpu(monkeypatch):
    monkeypatch.setattr(attention, "platform_of", lambda mesh: "tpu")


def test_step_with_kernels_is_as_near_to_float32_as_with_the_form_of_xla(tpu):
    """All gradients of a step, whose other operations are formulated as for TPUs."""
    t = training(TEXT)
    arguments = t.state.params, t.batch, jax.random.key(0)

    def gradients(form, dtype):
        text = replace(TEXT, attention=form, dtype=dtype)
        program = attention.forward_and_backward(t.config, text, build(text), t.mesh)
        _, loss, grads = program.lower(*arguments).compile(QUICK)(*arguments)
        return jax.device_get(grads), float(loss)

    exact, loss = gradients("xla", "float32")
    of_kernels, of_xla = (
        gradient_differences(gradients(form, "bfloat16")[0], exact, loss) for form in ("pallas", "xla")
    )
    # Rounding errors, up to 0.020 here. The absolute part is for the smallest of them.
    assert max(of_kernels.values()) < 0.03
    for name, difference in of_kernels.items():
        assert difference < 1.3 * of_xla[name] + 0.0005, name


@pytest.mark.parametrize(
    ("kernel", "change", "why"),
    [
        (
            "backward_kernel",
            halve_key_gradients,
            r"differ .*: gradient of txt/.*/key/kernel by 0.\d+, more than 0.1",
        ),
        ("forward_kernel", damage_last_row, r"differ .*: embedding by \d.*, more than 0.05"),
        ("forward_kernel", set_nan, r"differ .*: embedding by nan, more than 0.05"),
        ("backward_kernel", raise_error, r"failed on the first batch: NotImplementedError no lowering$"),
    ],
)
def test_kernel_that_is_broken_gives_the_form_of_xla(kernel, change, why, compare, monkeypatch, capsys):
    monkeypatch.setattr(packed_attention, kernel, broken_after(getattr(packed_attention, kernel), change))
    choice = compare()
    assert choice.form == "xla"
    assert not choice.pending
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == f"attention: XLA's form; {choice.why}"
    assert re.fullmatch(rf"the Pallas kernels {why}", choice.why)
    json.dumps(choice.record, allow_nan=False)


@pytest.mark.parametrize(
    ("kernel", "change", "why"),
    [
        ("backward_kernel", halve_key_gradients, "gradient of txt/.*/key/kernel"),
        ("forward_kernel", damage_last_row, "embedding"),
    ],
)
def test_kernel_for_true_lengths_that_is_broken_gives_the_form_of_xla(
    kernel, change, why, compare, monkeypatch
):
    monkeypatch.setattr(packed_attention, kernel, broken_after(getattr(packed_attention, kernel), change))
    choice = compare(text=TRUE_LENGTHS)
    assert choice.form == "xla"
    assert re.fullmatch(rf"the Pallas kernels differ .*: {why} by \d.*, more than 0.\d+", choice.why)


def test_choice_that_is_not_pending_is_not_compared():
    assert compare_attention(AttentionChoice("xla"), *[None] * 6) == AttentionChoice("xla")


def test_kernels_that_another_process_cannot_use_are_used_by_none(monkeypatch):
    monkeypatch.setattr(attention, "all_agree", lambda holds: False)
    mesh = make_mesh(jax.devices()[:1])
    choice = compile_kernels(PENDING, TEXT, build(TEXT), mesh)
    assert (choice.form, choice.why) == ("xla", "the Pallas kernels do not compile here: in another process")


def test_kernels_that_do_not_compile_give_the_form_of_xla_before_training(monkeypatch, capsys):
    broken = broken_after(packed_attention.forward_kernel, raise_error)
    monkeypatch.setattr(packed_attention, "forward_kernel", broken)
    mesh = make_mesh(jax.devices()[:1])
    choice = compile_kernels(PENDING, TEXT, build(TEXT), mesh)
    assert choice.form == "xla"
    reason = "the Pallas kernels do not compile here: NotImplementedError no lowering"
    assert capsys.readouterr().err == f"attention: XLA's form; {reason}\n"


def test_step_that_does_not_compile_with_the_kernels_gives_the_form_of_xla(monkeypatch, capsys):
    def fail():
        raise RuntimeError("INTERNAL: Mosaic failed to compile TPU kernel\nlong text")

    reason = (
        "the Pallas kernels do not compile here: RuntimeError INTERNAL: Mosaic failed to compile TPU kernel"
    )
    choice, result = with_kernels(AttentionChoice("pallas"), "auto", fail)
    assert (choice, result) == (AttentionChoice("xla", reason), None)
    assert capsys.readouterr().err == f"attention: XLA's form; {reason}\n"
    with pytest.raises(UserError) as caught:
        with_kernels(PENDING, "pallas", fail)
    assert str(caught.value) == f'text.attention "pallas" cannot be used: {reason}; set it to "auto"'
    with pytest.raises(RuntimeError, match="Mosaic"):  # not because of the kernels
        with_kernels(AttentionChoice("xla"), "auto", fail)

    assert with_kernels(PENDING, "auto", lambda: 3) == (PENDING, 3)
    monkeypatch.setattr(attention, "all_agree", lambda holds: False)
    choice, result = with_kernels(PENDING, "auto", lambda: 3)
    assert (choice.why, result) == ("the Pallas kernels do not compile here: in another process", None)


def propose(text, workdir=None, mesh=None):
    return propose_attention(text, build(text), mesh or make_mesh(jax.devices()[:1]), workdir)


def test_choice_on_cpus_is_the_form_of_xla_without_a_line(capsys):
    assert propose(TEXT) == AttentionChoice("xla", "the devices are CPUs")
    assert capsys.readouterr().err == ""


def test_choice_on_tpus_is_to_compare(tpu, capsys):
    assert propose(TEXT) == propose(TRUE_LENGTHS) == PENDING
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"pack": 1}, "text.pack is 1, and the kernels are for packed rows"),
        ({"pack": 9}, "rows of 144 tokens are not a multiple of 128"),
        ({"mask_padding": True, "row_tokens": 136}, "rows of 136 tokens are not a multiple of 128"),
        ({"heads": 4}, "the head size 8 is not a multiple of 16"),
        ({"depth": 1}, "the only layer pools a token"),
    ],
)
def test_choice_on_tpus_names_what_the_kernels_cannot_do(tpu, change, reason, capsys):
    text = replace(TEXT, **change)
    assert propose(text) == AttentionChoice("xla", reason)
    assert capsys.readouterr().err == f"attention: XLA's form; {reason}\n"
    with pytest.raises(UserError) as caught:
        propose(replace(text, attention="pallas"))
    assert str(caught.value) == f'text.attention "pallas" cannot be used: {reason}; set it to "auto"'


def test_kernels_by_request_are_refused_on_gpus(monkeypatch):
    monkeypatch.setattr(attention, "platform_of", lambda mesh: "gpu")
    assert propose(TEXT).why == "the devices are GPUs"
    with pytest.raises(UserError, match="cannot be used: the kernels are for TPUs; set it to"):
        propose(replace(TEXT, attention="pallas"))


def test_form_of_xla_by_request_is_not_compared(tpu):
    assert propose(replace(TEXT, attention="xla")).form == "xla"


def test_choice_of_a_resumed_run_is_the_recorded_one(tpu, tmp_path, capsys, monkeypatch):
    mesh = make_mesh(jax.devices()[:1])
    differences = {"embedding": 0.01, "loss": 0.001, "gradient": 0.02}
    write_attention(tmp_path, AttentionChoice("pallas", differences=differences))
    assert propose(TEXT, tmp_path) == AttentionChoice("pallas", differences=differences)
    assert capsys.readouterr().err == ""

    record = json.loads((tmp_path / "attention.json").read_text())
    (tmp_path / "attention.json").write_text(json.dumps(record | {"device_kind": "TPU v9"}))
    assert propose(TEXT, tmp_path) == PENDING
    assert "on other devices or versions; they are compared again" in capsys.readouterr().err
    monkeypatch.setattr(attention, "platform_of", lambda mesh: "cpu")
    assert propose(TEXT, tmp_path).form == "xla"
    assert (
        "has used the Pallas kernels so far; XLA's form differs from them by rounding"
        in capsys.readouterr().err
    )

    monkeypatch.setattr(attention, "platform_of", lambda mesh: "tpu")
    write_attention(tmp_path, AttentionChoice("xla", "a reason", differences={"embedding": float("nan")}))
    assert propose(TEXT, tmp_path, mesh) == AttentionChoice("xla", "a reason")
    assert capsys.readouterr().err == "attention: XLA's form, as when this run started\n"
    (tmp_path / "attention.json").write_text("{")
    assert propose(TEXT, tmp_path, mesh) == PENDING
    assert "is damaged" in capsys.readouterr().err


def test_differences_of_gradients_that_are_near_zero_have_another_measure():
    def tree(query, key, t):
        return {
            "query": {"bias": np.array(query)},
            "key": {"bias": np.array(key)},
            "t": np.array([t]),
            "mean": np.zeros(2),
        }

    found = gradient_differences(tree([3.0, 4.0], [1e-9, 0.0], 0.1), tree([3.0, 4.0], [0.0, 0.0], -0.1), 10.0)
    assert found == {"query/bias": 0, "key/bias": pytest.approx(2e-10), "t": pytest.approx(0.02), "mean": 0}


CONFIG = """
steps = 6
[text]
width = 32
depth = 2
heads = 1
mlp_dim = 32
pack = 8
mask_padding = true
row_tokens = 128
dtype = "bfloat16"
[stream]
global_batch = 32
[optimizer]
name = "adam"
warmup_steps = 1
[checkpoint]
every_steps = 3
[log]
every_steps = 1
"""


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("attention")
    make_dataset(path / "d", 100, captions=1, max_length=16)
    (path / "c.toml").write_text(CONFIG)
    return path


def train(directory, name, *more):
    arguments = [
        "train",
        directory / "c.toml",
        "--dataset",
        directory / "d",
        "--workdir",
        directory / name,
        *more,
    ]
    return main([str(a) for a in arguments])


def test_training_with_a_kernel_that_fails_uses_the_form_of_xla(directory, tpu, monkeypatch, capsys):
    broken = broken_after(packed_attention.backward_kernel, raise_error)
    monkeypatch.setattr(packed_attention, "backward_kernel", broken)
    assert train(directory, "broken", "--steps", 2) == 0
    line = "attention: XLA's form; the Pallas kernels do not compile here: NotImplementedError no lowering\n"
    assert line in capsys.readouterr().err
    receipt = json.loads((directory / "broken/receipt.json").read_text())["attention"]
    assert (receipt["form"], receipt["differences"]) == ("xla", {})


def test_training_whose_whole_step_does_not_compile_uses_the_form_of_xla(directory, tpu, monkeypatch, capsys):
    def compare_and_break(*arguments):
        choice = compare_attention(*arguments)
        broken = broken_after(packed_attention.backward_kernel, raise_error)
        monkeypatch.setattr(packed_attention, "backward_kernel", broken)
        return choice

    monkeypatch.setattr(step_builder, "compare_attention", compare_and_break)
    assert train(directory, "whole", "--steps", 2) == 0
    err = capsys.readouterr().err
    assert "attention: Pallas kernels; largest differences" in err
    reason = "the Pallas kernels do not compile here: NotImplementedError no lowering"
    assert f"attention: XLA's form; {reason}\n" in err
    receipt = json.loads((directory / "whole/receipt.json").read_text())["attention"]
    assert (receipt["form"], receipt["why"]) == ("xla", reason)
    assert receipt["differences"]["embedding"] < TOLERANCES["embedding"]


def test_training_with_kernels_that_agree_records_and_keeps_them(directory, tpu, monkeypatch, capsys):
    assert train(directory, "kernels") == 0
    assert "attention: Pallas kernels; largest differences from XLA's form" in capsys.readouterr().err
    receipt = json.loads((directory / "kernels/receipt.json").read_text())["attention"]
    assert receipt["form"] == "pallas"
    assert 0 < receipt["differences"]["gradient"] < TOLERANCES["gradient"]
    assert receipt["tolerances"] == TOLERANCES
    kernels = open_run(directory / "kernels")

    # As if it had been killed after step 3: it continues with the kernels, without a comparison.
    shutil.rmtree(directory / "kernels/checkpoints/6")
    (directory / "kernels/receipt.json").unlink()
    monkeypatch.setattr(attention, "compare_forms", None)
    assert train(directory, "kernels") == 0
    assert "resuming after step 3" in capsys.readouterr().err
    jax.tree.map(np.testing.assert_array_equal, kernels.params, open_run(directory / "kernels").params)
    assert json.loads((directory / "kernels/receipt.json").read_text())["attention"] == receipt


def test_kernels_by_request_on_cpus_are_said_to_be_slow(capsys):
    mesh = make_mesh(jax.devices()[:1])
    choice = propose(replace(TEXT, attention="pallas"))
    assert choice == AttentionChoice("pallas")
    assert compile_kernels(choice, TEXT, build(TEXT), mesh) is choice
    assert "interpreted: many times slower than XLA's form" in capsys.readouterr().err


def test_training_with_kernels_that_cannot_be_used_ends_with_a_line(directory, capsys):
    assert train(directory, "refused", "--text.attention", "pallas", "--text.row_tokens", 124) == 2
    reason = "rows of 124 tokens are not a multiple of 8"
    assert capsys.readouterr().err.endswith(
        f'text.attention "pallas" cannot be used: {reason}; set it to "auto"\n'
    )
