"""Rows of files as texts or conversations, and conversations through the tokenizer's chat template."""

import json
from pathlib import Path

import pytest
from byte_tokenizer import byte_tokenizer

from calibration.errors import ToolkitError
from calibration.text.chats import as_text
from calibration.text.corpora import load_corpus
from calibration.text.crops import calibration_tokens
from calibration.text.encoding import encode_text

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %};"
MESSAGES = [{"role": "user", "content": "hi, é"}, {"role": "assistant", "content": "yes"}]
WHOLE = "<user>hi, é<assistant>yes;"
ROWS = {
    "messages": {"messages": MESSAGES, "prompt": "not this", "id": 3},
    "prompt and completion": {"prompt": "hi, é", "completion": "yes"},
    "lists of both": {"prompt": MESSAGES[:1], "completion": MESSAGES[1:]},
    "instruction": {"instruction": "hi, é", "input": "", "output": "yes"},
}


def write(path: Path, rows: list[object]) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        import datasets

        datasets.Dataset.from_list(rows).to_parquet(path)
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
@pytest.mark.parametrize("kind", ROWS)
def test_conversations_go_through_the_template(tmp_path: Path, kind: str, suffix: str) -> None:
    path = write(tmp_path / f"chat{suffix}", [ROWS[kind], ROWS[kind]])
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    found = as_text(load_corpus(str(path), "calibrate"), tokenizer)
    assert found.text == WHOLE * 2 and not found.special_tokens
    tokens = calibration_tokens(load_corpus(str(path), "calibrate"), tokenizer, 4, 12, 0)
    assert tokenizer.decode(tokens.input_ids[0]) in WHOLE * 2
    assert tokens.source["join"] == "conversations by the chat template"
    assert encode_text(load_corpus(str(path), "score"), tokenizer).fingerprint == found.fingerprint


def test_an_input_stands_behind_the_instruction(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", [{"instruction": "add", "input": "1 2", "output": "3"}])
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    assert as_text(load_corpus(str(path), "calibrate"), tokenizer).text == "<user>add\n\n1 2<assistant>3;"


def test_csv_and_json_rows_are_texts(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes('\ufeffid,text\r\n1,"one, ""two"""\r\n2,"a\nb"\r\n'.encode())
    assert load_corpus(str(tmp_path / "a.csv"), "calibrate").text == 'one, "two"\n\na\nb'
    for rows in (["x", "y"], [{"text": "x"}, {"text": "y"}]):
        assert load_corpus(str(write(tmp_path / "a.json", rows)), "calibrate").text == "x\n\ny"


def test_the_template_runs_in_a_sandbox_and_its_refusal_is_one_message(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [ROWS["messages"]])
    tokenizer = byte_tokenizer()
    with pytest.raises(ToolkitError, match="no chat template"):
        as_text(load_corpus(str(path), "calibrate"), tokenizer)
    marker = tmp_path / "escaped"
    escape = f"cycler.__init__.__globals__.os.mkdir('{marker}')"
    for template in (f"{{{{ {escape} }}}}", "{{ raise_exception('roles must alternate') }}"):
        tokenizer.chat_template = template
        with pytest.raises(ToolkitError, match="conversation 0: the chat template refuses it"):
            as_text(load_corpus(str(path), "calibrate"), tokenizer)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "{}", "not a list of rows"),
        ("a.json", "[{", "not JSON"),
        ("a.json", '[{"text": "x"}, {"messages": [{"role": "user", "content": "y"}]}]', "some rows are texts"),
        ("a.json", '[{"messages": [{"role": "user"}]}]', "row 0: messages: a message without a role and a text"),
        ("a.json", '[{"messages": "hello"}]', "not a list of messages"),
        ("a.csv", "id,body\n1,x\n", "row 0: no string under the key 'text'.*id, body"),
        ("a.jsonl", '{"text": null}', "line 1: no string"),
    ],
)
def test_rows_of_a_wrong_shape_are_named(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ToolkitError, match=message):
        load_corpus(str(tmp_path / name), "calibrate")


def test_the_plan_opens_the_file(tmp_path: Path) -> None:
    import ptq

    (tmp_path / "rows.jsonl").write_text('{"text": "x"}\n{"text": null}\n')
    chats = write(tmp_path / "chat.jsonl", [ROWS["messages"]])
    (tmp_path / "empty.txt").write_text(" \n")
    cases = {"rows.jsonl": "line 2", "empty.txt": "no text in it", chats.name: "no chat template"}
    for name, words in cases.items():
        with pytest.raises(ToolkitError, match=words):
            ptq.plan("demo", method="awq", dataset=tmp_path / name)
    ptq.plan("demo", method="rtn", dataset=tmp_path / "rows.jsonl")  # needs no data


@pytest.mark.parametrize("name", ["ultrachat", "open-platypus"])
def test_named_sets_of_conversations(tmp_path: Path, name: str) -> None:
    repo = {"ultrachat": "HuggingFaceH4/ultrachat_200k", "open-platypus": "garage-bAInd/Open-Platypus"}[name]
    row = ROWS["messages" if name == "ultrachat" else "instruction"]
    folder = tmp_path / repo
    folder.mkdir(parents=True)
    split = "train_sft" if name == "ultrachat" else "train"
    write(folder / f"{split}.parquet", [row] * 3)
    readme = (
        f"---\nconfigs:\n- config_name: default\n  data_files:\n  - split: {split}\n    path: {split}.parquet\n---\n"
    )
    (folder / "README.md").write_text(readme)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    corpus = load_corpus(name, "calibrate", hub_root=tmp_path)
    assert as_text(corpus, tokenizer).text == WHOLE * 3 and corpus.label == f"{repo}, {split}"
