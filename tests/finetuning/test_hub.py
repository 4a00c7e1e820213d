"""Uploads to a stand-in of the hub: the files and the card arrive, and other tools load them."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import huggingface_hub
import peft
import pytest
import torch
import transformers
import yaml
from helpers import sample_results as sample
from helpers.hub import TOKEN, Hub, Repo, running_hub
from helpers.saved import VERBALIZER, save_model
from helpers.tiny_models import prompts
from helpers.tiny_training import HEADS
from typer.testing import CliRunner

import cdt_lens as cdt
from cdt_lens.cli import app as cli
from cdt_lens.core.artifacts import load_artifact, save_artifact
from cdt_lens.core.errors import ArtifactError, InputError
from cdt_lens.finetuning.adapter import Adapter
from cdt_lens.finetuning.hub import push_to_hub
from cdt_lens.finetuning.model_card import model_card
from cdt_lens.models.view import ModelView
from cdt_lens.tasks.intervals import share_interval

pytestmark = [
    # What peft asks of transformers is deprecated there, as is how huggingface_hub sends files.
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing"),
    pytest.mark.filterwarnings("ignore:Use 'content="),
]
ROWS = 24


@pytest.fixture(autouse=True)
def hub(monkeypatch, tmp_path) -> Iterator[Hub]:
    """The stand-in, in place of the hub, with a user who is logged in."""
    constants = huggingface_hub.constants
    with running_hub() as found:
        monkeypatch.setattr(constants, "ENDPOINT", found.url)
        template = found.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", found.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        # The protocol of Xet is not part of the stand-in: files go by Git LFS.
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield found
    huggingface_hub.close_session()


def rows(path: Path, shift: int) -> Path:
    """Rows whose second word tells the label."""
    lines = [
        f"w{20 + (7 * i + shift) % 60} w{30 + i % 3},{list(VERBALIZER)[i % 3]}" for i in range(ROWS)
    ]
    path.write_text("\n".join(["text,label", *lines]) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A base model, an adapter that has learnt, its checkpoint in `out` and its LoRA in `lora`."""
    place = tmp_path_factory.mktemp("push")
    save_model(place / "base")
    for name in ("LICENSE", "NOTICE.txt", "README.md"):
        (place / "base" / name).write_text(f"{name} of the base\n", encoding="utf-8")
    model = cdt.load_model(place / "base", backend="bridge")
    files = {name: rows(place / f"{name}.csv", i) for i, name in enumerate(("train", "valid"))}
    task = cdt.task_from_files(
        files, tokenizer=model.tokenizer, template="{text} w5", verbalizer=VERBALIZER
    )
    result = cdt.finetune(
        model, task, heads=HEADS, source=task, epochs=3, learning_rate=3e-2, norms="none",
        biases=False, progress=False,
    )  # fmt: skip
    assert result.after["target_accuracy"] > result.before["target_accuracy"]
    result.adapter.save(place / "adapter")
    (place / "adapter" / "log.jsonl").write_text("{}\n", encoding="utf-8")
    cdt.export(result.adapter, place / "base", place / "out")
    cdt.to_peft(result.adapter, place / "base", place / "lora")
    # With a card the base can be uploaded as well, like the proxy of a transfer.
    (place / "base" / "README.md").write_bytes((place / "out" / "README.md").read_bytes())
    return place


def write(repo: Repo, folder: Path) -> Path:
    folder.mkdir()
    for name, content in repo.files.items():
        (folder / name).write_bytes(content)
    return folder


def front(repo: Repo) -> dict[str, Any]:
    """The metadata, read by a YAML parser alone."""
    return dict(yaml.safe_load(repo.files["README.md"].decode().split("---\n")[1]))


def files_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def trained_logits(place: Path) -> torch.Tensor:
    view = ModelView(cdt.load_model(place / "base", backend="bridge"))
    with Adapter.load(place / "adapter").applied(view):
        return view.logits(prompts())


def test_a_checkpoint_arrives_whole_and_plain_transformers_loads_it(place, hub, tmp_path):
    assert push_to_hub(place / "out", "me/javanese") == f"{hub.url}/me/javanese"
    repo = hub.repos["me/javanese"]
    assert repo.private and len(repo.commits) == 1
    sent = {n: c for n, c in repo.files.items() if n not in (".gitattributes", "README.md")}
    assert sent == {n: c for n, c in files_of(place / "out").items() if n != "README.md"}
    assert {"LICENSE", "NOTICE.txt", "README.base.md"} <= set(sent)
    assert any("cdt_lens" in agent for agent in hub.agents)
    model = transformers.AutoModelForCausalLM.from_pretrained(write(repo, tmp_path / "got"))
    with torch.no_grad():
        found = model(prompts()).logits
    torch.testing.assert_close(found, trained_logits(place), rtol=0, atol=1e-5)


def test_the_code_of_the_card_runs_from_the_hub(place, hub, capsys):
    push_to_hub(place / "out", "javanese")
    text = hub.repos["me/javanese"].files["README.md"].decode()
    plain, own = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert "cdt_lens" not in plain
    exec(plain.replace("Put your text here.", "w20 w31"), {})
    assert capsys.readouterr().out.split()[0] in VERBALIZER
    names: dict[str, Any] = {}
    exec(own, names)
    logits = ModelView(names["model"]).logits(prompts())
    torch.testing.assert_close(logits, trained_logits(place), rtol=0, atol=1e-5)


def test_a_lora_names_its_base_on_the_hub_and_peft_loads_both(place, hub):
    with pytest.raises(
        InputError, match="base model in a folder of this machine; give base_model="
    ):
        push_to_hub(place / "lora", "me/lora")
    assert not hub.repos
    push_to_hub(place / "base", "me/proxy", private=False)
    push_to_hub(place / "lora", "me/lora", base_model="me/proxy")
    assert front(hub.repos["me/lora"])["base_model"] == "me/proxy"
    model: Any = peft.AutoPeftModelForCausalLM.from_pretrained("me/lora")
    with torch.no_grad():
        found = model(prompts()).logits
    torch.testing.assert_close(found, trained_logits(place), rtol=0, atol=1e-5)
    text = hub.repos["me/lora"].files["README.md"].decode()
    names: dict[str, Any] = {}
    exec(re.findall(r"```python\n(.*?)```", text, re.DOTALL)[-1], names)
    assert names["adapter"].heads == Adapter.load(place / "adapter").heads


def test_an_adapter_goes_alone_and_its_card_loads_it(place, hub, tmp_path, monkeypatch):
    push_to_hub(place / "adapter", "me/adapter", base_model="me/proxy")
    adapter = Adapter.load(place / "adapter")
    push_to_hub(adapter, "me/again", base_model="me/proxy")
    for name in ("me/adapter", "me/again"):
        repo = hub.repos[name]
        names = {n for n in repo.files if not n.endswith(".safetensors")}
        assert names == {".gitattributes", "README.md", "adapter.json"}
        assert Adapter.load(write(repo, tmp_path / name.replace("/", "-"))) == adapter
    monkeypatch.chdir(tmp_path)
    found: dict[str, Any] = {}
    text = hub.repos["me/adapter"].files["README.md"].decode()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert 'base = "me/proxy"\n' in code
    exec(code.replace('"me/proxy"', repr(str(place / "base"))), found)
    assert found["adapter"] == adapter
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    with torch.no_grad():
        logits = model(prompts()).logits
    torch.testing.assert_close(logits, trained_logits(place), rtol=0, atol=1e-5)


def test_the_card_says_what_was_trained_and_measured(place, hub):
    push_to_hub(
        place / "out", "me/one", license="cc-by-sa-4.0", language=["jv"], datasets=["indonlp/nusax"],
        base_model="org/proxy",
    )  # fmt: skip
    push_to_hub(place / "out", "me/two")
    one, two = (hub.repos[name] for name in ("me/one", "me/two"))
    data = front(one)
    assert (data["license"], data["language"]) == ("cc-by-sa-4.0", ["jv"])
    assert (data["datasets"], data["base_model"]) == (["indonlp/nusax"], "org/proxy")
    # Nothing that was not given: the base is a folder here.
    assert not {"license", "language", "datasets", "base_model"} & set(front(two))
    adapter = Adapter.load(place / "adapter")
    card = huggingface_hub.ModelCard(one.files["README.md"].decode())
    results = {r.dataset_config: r.metric_value for r in card.data.eval_results or ()}
    assert results == {score.role: score.after[0] for score in adapter.scores}
    assert set(results) == {"target", "source"} and adapter.total_parameters
    for score in adapter.scores:
        low, high = share_interval(round(score.after[0] * ROWS), ROWS)
        assert f"{score.after[0]:.3f} [{low:.3f}, {high:.3f}]" in card.text
        assert f"{score.before[0]:.3f} [" in card.text and score.examples == ROWS
    assert "L0H1, L1H2" in card.text and "`decision`" in card.text
    assert f"{adapter.elements:,} of {adapter.total_parameters:,}" in card.text
    for text in (one.files["README.md"], two.files["README.md"]):
        assert str(place).encode() not in text


def test_a_base_on_the_hub_is_named_in_the_metadata():
    card = model_card(sample.fine_tuning().adapter, "HuggingFaceTB/SmolLM2-135M", "lora")
    assert card.data.base_model == "HuggingFaceTB/SmolLM2-135M"
    assert (card.data.library_name, card.data.get("eval_results")) == ("peft", None)


def test_an_edited_card_is_kept(place, hub, tmp_path):
    folder = write(Repo(True, files_of(place / "out")), tmp_path / "copy")
    card = (folder / "README.md").read_text("utf-8")
    (folder / "README.md").write_text(card + "\nRead this first.\n", encoding="utf-8")
    push_to_hub(folder, "me/edited", license="mit")
    repo = hub.repos["me/edited"]
    assert repo.files["README.md"].endswith(b"\nRead this first.\n")
    assert front(repo)["license"] == "mit"


def test_a_repository_with_files_is_only_replaced_where_asked(place, hub):
    hub.repos["me/mine"] = Repo(True, {".gitattributes": b"", "notes.txt": b"of another day"})
    with pytest.raises(InputError, match=r"me/mine: exists and holds notes.txt; pass overwrite"):
        push_to_hub(place / "out", "me/mine")
    assert set(hub.repos["me/mine"].files) == {".gitattributes", "notes.txt"}
    push_to_hub(place / "out", "me/mine", overwrite=True)
    assert set(hub.repos["me/mine"].files) == {".gitattributes", *files_of(place / "out")}


def test_a_private_upload_does_not_go_into_a_public_repository(place, hub):
    hub.repos["me/open"] = Repo(False)
    with pytest.raises(InputError, match="me/open: exists and is public; pass private=False"):
        push_to_hub(place / "out", "me/open")
    assert set(hub.repos["me/open"].files) == {".gitattributes"}
    push_to_hub(place / "out", "me/open", private=False)
    assert "model.safetensors" in hub.repos["me/open"].files


def test_files_that_no_export_writes_are_not_sent(place, hub, tmp_path):
    """A person's rows must not reach a repository."""
    shutil.copytree(place / "out", tmp_path / "out")
    (tmp_path / "out" / "rows.csv").write_text("private", "utf-8")  # left out without a word
    push_to_hub(tmp_path / "out", "me/clean")
    assert "rows.csv" not in hub.repos["me/clean"].files
    for name in ("train_rows.json", "notes.txt"):
        (tmp_path / "out" / name).write_text("{}", "utf-8")
        with pytest.raises(InputError, match=f"{name}: no file that export writes.*Move it out"):
            push_to_hub(tmp_path / "out", "me/other")
        (tmp_path / "out" / name).unlink()
    assert "me/other" not in hub.repos


def test_nothing_is_sent_that_is_refused_here(place, hub, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="expected a folder of Adapter.save, export or to_peft"):
        push_to_hub(tmp_path, "me/x")
    (tmp_path / "README.md").write_text("# Of another tool\n", encoding="utf-8")
    with pytest.raises(InputError, match="expected a folder of Adapter.save, export or to_peft"):
        push_to_hub(tmp_path, "me/x")
    (tmp_path / "README.md").write_text("---\n: [\n---\n", encoding="utf-8")
    with pytest.raises(InputError, match="its metadata cannot be read"):
        push_to_hub(tmp_path, "me/x")
    (tmp_path / "adapter.json").write_text("{", encoding="utf-8")
    with pytest.raises(ArtifactError, match="damaged"):
        push_to_hub(tmp_path, "me/x")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="offline mode is on"):
        push_to_hub(place / "out", "me/x")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
    with pytest.raises(InputError, match="no access token; run hf auth login"):
        push_to_hub(place / "out", "me/x")
    assert hub.requests == []


@pytest.mark.parametrize(
    ("repo", "token", "told"),
    [
        ("me/x", "hf_wrong", "me/x: the upload failed .*401"),
        ("them/x", None, "them/x: the upload failed .*(403|rights)"),
        ("a/b/c", None, "a/b/c: the upload failed .*a/b/c"),
    ],
)
def test_what_the_hub_refuses_is_told_in_one_line(repo, token, told, place, hub):
    with pytest.raises(InputError, match=told) as raised:
        push_to_hub(place / "out", repo, token=token)
    assert "\n" not in str(raised.value)
    assert not hub.repos


def test_the_command(place, hub):
    given = ["--public", "--license", "mit", "--language", "jv", "--language", "su"]
    given += ["--dataset", "indonlp/nusax", "--base-model", "org/proxy"]
    result = CliRunner().invoke(cli.app, ["push", str(place / "out"), "me/x", *given])
    assert result.exit_code == 0 and result.output.strip().endswith(f"{hub.url}/me/x")
    repo = hub.repos["me/x"]
    data = front(repo)
    assert (data["language"], data["datasets"]) == (["jv", "su"], ["indonlp/nusax"])
    assert (data["license"], data["base_model"], repo.private) == ("mit", "org/proxy", False)
    with pytest.raises(InputError, match="pass --overwrite to replace"):
        CliRunner().invoke(
            cli.app, ["push", str(place / "out"), "me/x", "--public"], catch_exceptions=False
        )
    again = ["push", str(place / "out"), "me/x", "--public", "--overwrite"]
    assert CliRunner().invoke(cli.app, again).exit_code == 0


def test_scores_stay_with_the_adapter_and_old_files_have_none(place, tmp_path):
    adapter = Adapter.load(place / "adapter")
    assert [score.split for score in adapter.scores] == ["validation", "validation"]
    bare = replace(adapter, scores=(), total_parameters=None)
    assert Adapter.load(bare.save(tmp_path)) == bare
    body, tensors = load_artifact(tmp_path / "adapter.json", format="cdt_lens.adapter", version=1)
    good = asdict(adapter.scores[0])

    def saved(score: dict[str, Any]) -> Adapter:
        document = body | {"scores": [score]}
        path = tmp_path / "x.json"
        save_artifact(path, document, format="cdt_lens.adapter", version=1, tensors=tensors)
        return Adapter.load(path)

    assert saved(good).scores == adapter.scores[:1]
    for wrong in ({"after": (0.5, 0.4)}, {"examples": 0}, {"task": 3}, {"before": ("a", 0, 1)}):
        with pytest.raises(ArtifactError, match="not a whole adapter"):
            saved(good | wrong)
