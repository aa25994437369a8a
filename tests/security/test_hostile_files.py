"""Artifacts, prompts and model folders that somebody else made: read as data, or refused."""

from __future__ import annotations

import json
import os
import pickle
import struct
from pathlib import Path
from typing import Any

import pytest

from proxyprompt import Artifact, Demonstration, FewShotPrompt, Query, load_prompt
from proxyprompt.backends.transformers import TransformersBackend
from proxyprompt.config import load_config
from proxyprompt.errors import ArtifactError, BackendError, DataError, ProxyPromptError
from proxyprompt.outputs import write_outputs

BODY: dict[str, Any] = {
    "kind": "proxyprompt-artifact",
    "schema": 1,
    "original_prompt": {
        "demonstrations": [{"id": i, "inputs": {"input": f"text {i}"}, "output": "y"} for i in "ab"],
    },
    "kept": ["b"],
    "removed": ["a"],
    "certificate": {"decision": "certified"},
    "summary": {},
}


# --- artifacts and prompts -------------------------------------------------------------------------------


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    """Rows that a path in somebody else's file could point at."""
    path = tmp_path / "private.jsonl"
    path.write_text(
        '{"id": "a", "input": "my secret", "output": "y"}\n{"id": "b", "input": "more", "output": "y"}\n'
    )
    return path


@pytest.mark.parametrize("form", ["str", "relative", "url", "dict"])
def test_no_path_in_an_artifact_is_followed(
    secret: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    monkeypatch.chdir(tmp_path)
    named: Any = {
        "str": str(secret),
        "relative": secret.name,
        "url": secret.as_uri(),
        "dict": {"file": str(secret)},
    }[form]
    path = tmp_path / "artifact.json"
    path.write_text(json.dumps(BODY | {"original_prompt": {"demonstrations": named}}))
    with pytest.raises(ArtifactError, match="must be a list of rows") as caught:
        Artifact.load(path)
    assert "my secret" not in str(caught.value)
    (tmp_path / "prompt.json").write_text(json.dumps({"demonstrations": named}))
    with pytest.raises(DataError, match="must be a list of rows"):
        load_prompt(tmp_path / "prompt.json")
    (tmp_path / "config.toml").write_text(
        '[prompt]\nfile = "prompt.json"\n[queries]\nfile = "q.jsonl"\n[task]\n'
        'labels = ["a", "b"]\n[target]\nmodel = "openai:m"'
    )
    with pytest.raises(DataError, match="must be a list of rows"):
        load_config(tmp_path / "config.toml")


@pytest.mark.parametrize(
    "change",
    [
        {"original_prompt": {**BODY["original_prompt"], "template_file": "/etc/passwd"}},
        {"original_prompt": {**BODY["original_prompt"], "style": ["completion"]}},
        {
            "original_prompt": {
                **BODY["original_prompt"],
                "demonstration_template": "{input.__class__} {output}",
            }
        },
        {"original_prompt": {**BODY["original_prompt"], "demonstration_template": "{input!r} {output}"}},
        {
            "original_prompt": {
                **BODY["original_prompt"],
                "demonstration_template": "{input:>200000000} {output}",
            }
        },
        {
            "original_prompt": {
                "demonstrations": [{"id": "a", "inputs": {"input": {"__reduce__": 1}}, "output": "y"}]
            }
        },
        {"original_prompt": {"demonstrations": [{"id": "a"}, {"id": "a"}]}},
        {"kept": "b"},
        {"kept": ["b", "b"], "removed": []},
        {"removed": ["../../a"]},
        {"kept": {"b": 1}, "removed": None},
        {"schema": "1"},
    ],
)
def test_artifacts_that_are_not_what_we_wrote(tmp_path: Path, change: dict[str, Any]) -> None:
    path = tmp_path / "artifact.json"
    path.write_text(json.dumps(BODY | change))
    with pytest.raises(ArtifactError):
        Artifact.load(path)


@pytest.mark.parametrize(
    "data",
    [pickle.dumps(BODY), b"\x80\x05", b"PK\x03\x04", b"\xff\xfe", b"NaN", b'{"kind": NaN', b"[" * 99_999],
)
def test_files_that_are_no_artifact(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "artifact.json"
    path.write_bytes(data)
    with pytest.raises(ArtifactError):
        Artifact.load(path)


def test_values_are_never_templates() -> None:
    text = "{input.__class__} {{ 7*7 }} %s ${HOME} {output} {% x %}"
    prompt = FewShotPrompt((Demonstration("d", {"input": text}, text),), instruction=text)
    shown = f"Input: {text}\nOutput:"
    assert prompt.render(None, Query("q", {"input": text}, "")) == f"{text}\n\n{shown} {text}\n\n{shown}"


def test_outputs_do_not_follow_links(tmp_path: Path) -> None:
    """A link that waits in the output folder is replaced, and what it points at stays."""
    victim = tmp_path / "victim"
    victim.write_text("mine")
    out = tmp_path / "out"
    out.mkdir()
    for name in ("artifact.json", "prompt.json", "report.html", "report.md"):
        (out / name).symlink_to(victim)
    summary = json.loads((Path(__file__).parents[1] / "unit" / "report_summary.json").read_text())
    write_outputs(Artifact(BODY | {"summary": summary}), out)
    assert victim.read_text() == "mine"
    assert not any(p.is_symlink() for p in out.iterdir())
    assert {p.stat().st_mode & 0o777 for p in out.iterdir()} == {0o600}


def test_ids_never_become_file_names(tmp_path: Path) -> None:
    demos = [{"id": i, "inputs": {"input": "x"}, "output": "y"} for i in ("../../a", "/etc/b")]
    body = BODY | {"original_prompt": {"demonstrations": demos}, "kept": ["/etc/b"], "removed": ["../../a"]}
    summary = json.loads((Path(__file__).parents[1] / "unit" / "report_summary.json").read_text())
    write_outputs(Artifact(body | {"summary": summary}), tmp_path / "deep" / "out")
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == [
        "artifact.json", "prompt.json", "report.html", "report.md",
    ]  # fmt: skip


# --- model folders ---------------------------------------------------------------------------------------

LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
CODE = "import pathlib\npathlib.Path(__file__).with_name('ran').touch()\n"


def model(folder: Path, config: Any = LLAMA, weights: bool = True) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if weights:
        header = b"{}"
        (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    for name in ("configuration_evil.py", "modeling_evil.py", "tokenization_evil.py"):
        (folder / name).write_text(CODE)
    return folder


def refused(folder: Path, reason: str) -> None:
    backend = TransformersBackend(folder)
    with pytest.raises(BackendError, match=reason):
        _ = backend.identity
    with pytest.raises(ProxyPromptError):
        backend.count_tokens("x")
    assert not (folder / "ran").exists()


AUTO = {
    "AutoConfig": "configuration_evil.EvilConfig",
    "AutoModelForCausalLM": "modeling_evil.EvilForCausalLM",
}


def test_a_model_that_brings_code(tmp_path: Path) -> None:
    refused(
        model(tmp_path / "m", {"architectures": ["EvilForCausalLM"], "model_type": "evil", "auto_map": AUTO}),
        r"brings code of its own \(auto_map\)",
    )


def test_code_beside_a_known_model_is_not_run(tmp_path: Path) -> None:
    """transformers knows the architecture, so the folder's code is not needed; nothing of it runs."""
    folder = model(tmp_path / "m", {**LLAMA, "auto_map": AUTO})
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": [None, "tokenization_evil.Evil"]}}
        )
    )
    backend = TransformersBackend(folder)
    assert backend.identity["provider"] == "transformers"
    with pytest.raises(ProxyPromptError):
        backend.count_tokens("x")
    assert not (folder / "ran").exists()


@pytest.mark.parametrize(
    "key", ["_attn_implementation_internal", "_attn_implementation", "_experts_implementation_internal"]
)
@pytest.mark.parametrize("nested", [False, True])
def test_internal_keys_that_load_code(tmp_path: Path, key: str, nested: bool) -> None:
    extra = {key: "somebody/kernels"}
    refused(model(tmp_path / "m", {**LLAMA, **({"text_config": extra} if nested else extra)}), f"sets {key}")


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "model.pt", "model.pth", "model.ckpt", "model.pkl", "model.bin"]
)
def test_pickled_weights(tmp_path: Path, name: str) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "ran"),)

    folder = model(tmp_path / "m", weights=False)
    (folder / name).write_bytes(pickle.dumps(Evil()))
    refused(folder, "pickled weights are never loaded")
    assert not (tmp_path / "ran").exists()


def test_a_pickle_that_is_called_safetensors(tmp_path: Path) -> None:
    folder = model(tmp_path / "m", weights=False)
    (folder / "model.safetensors").write_bytes(pickle.dumps({"x": 1}) * 9)
    refused(folder, "not a readable safetensors file")


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "model.safetensors", "chat_template.jinja"]
)
def test_links_out_of_the_folder(tmp_path: Path, name: str) -> None:
    folder = model(tmp_path / "m")
    outside = tmp_path / "outside"
    outside.write_bytes((folder / name).read_bytes() if (folder / name).exists() else b"x")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(outside)
    refused(folder, f"{name} in 'm' is a link to somewhere else")


def test_links_of_a_hubs_cache_are_its_own(tmp_path: Path) -> None:
    blobs = tmp_path / "models--o--m" / "blobs"
    blobs.mkdir(parents=True)
    folder = tmp_path / "models--o--m" / "snapshots" / ("0" * 40)
    folder.parent.mkdir()
    model(folder)
    for name in ("config.json", "model.safetensors"):
        (folder / name).rename(blobs / name)
        (folder / name).symlink_to(Path("../../blobs") / name)
    assert TransformersBackend(folder).identity["provider"] == "transformers"


@pytest.mark.parametrize("config", [[], 3, None, "x"])
def test_a_configuration_that_is_no_object(tmp_path: Path, config: Any) -> None:
    refused(model(tmp_path / "m", config), "no JSON object")
