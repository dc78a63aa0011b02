"""Reading: every layout and format gives the same rows, and every defect is a DataError that names its line."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tunesmith.data.layout import is_prompt_only
from tunesmith.data.read import items, read, read_choices, unread
from tunesmith.errors import DataError, RecipeError, TunesmithError
from tunesmith.recipe import DataSpec
from tunesmith.types import Comparison, Conversation, Row

PAIR = {"prompt": "Where is my order?", "completion": "On its way."}
TURNS = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello!"},
]


def write(path: Path, *rows: object, end: str = "\n") -> str:
    path.write_bytes("".join(json.dumps(row) + end for row in rows).encode())
    return str(path)


def rows_of(source: str, **spec: object) -> list[Row]:
    return list(read(source, DataSpec.model_validate({"train": source, **spec})))


def conversation(source: str, **spec: object) -> Conversation:
    row = rows_of(source, **spec)[0]
    assert isinstance(row, Conversation)
    return row


def failure(path: Path, content: bytes | str, **spec: object) -> DataError:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(DataError) as caught:
        rows_of(str(path), **spec)
    assert caught.value.where.startswith(str(path))
    assert caught.value.fix
    return caught.value


def test_the_same_row_has_the_same_id_in_every_format(tmp_path: Path) -> None:
    line = json.dumps(PAIR)
    (tmp_path / "a.json").write_text(f"[{line}]")
    (tmp_path / "b.csv").write_text("prompt,completion\nWhere is my order?,On its way.\n")
    pq.write_table(pa.Table.from_pylist([PAIR]), tmp_path / "c.parquet")
    sources = [write(tmp_path / "d.jsonl", PAIR), *(str(tmp_path / name) for name in ("a.json", "b.csv", "c.parquet"))]
    for source in list(sources):
        packed = Path(source + ".gz")
        packed.write_bytes(gzip.compress(Path(source).read_bytes()))
        sources.append(str(packed))
    rows = [rows_of(source) for source in sources]
    assert {len(found) for found in rows} == {1}
    assert len({found[0].id for found in rows}) == 1


def test_calls_in_parquet_keep_their_own_arguments_and_no_other_calls(tmp_path: Path) -> None:
    calls = [{"name": "weather", "arguments": {"city": "Paris"}}, {"name": "stock", "arguments": {"ticker": "X"}}]
    rows = [
        {"messages": [TURNS[1], {"role": "assistant", "tool_calls": [{"function": call}]}], "system": None}
        for call in calls
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    found = [row for row in rows_of(str(tmp_path / "a.parquet")) if isinstance(row, Conversation)]
    assert [row.messages[-1].tool_calls for row in found] == [({"function": call},) for call in calls]
    empty = pa.table({"prompt": ["q"], "completion": pa.array([None], pa.string())})
    pq.write_table(empty, tmp_path / "b.parquet")
    with pytest.raises(DataError, match=r"'completion' is empty \(null\)"):
        rows_of(str(tmp_path / "b.parquet"))


def test_text_that_parquet_holds_as_bytes_is_read_as_text(tmp_path: Path) -> None:
    table = {"prompt": ["où?".encode()], "completion": [b"here"], "image": [b"\x89PNG"], "key": [b"\0"]}
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    row = conversation(str(tmp_path / "a.parquet"))
    assert (row.prompt[0].content, row.completion) == ("où?", "here")


def test_an_id_does_not_change_between_machines_and_versions(tmp_path: Path) -> None:
    assert conversation(write(tmp_path / "a.jsonl", PAIR)).id == "4b3e00dc207c9fec"


def test_a_row_names_its_file_and_physical_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f"\n{json.dumps(PAIR)}\n\n\n{json.dumps(PAIR)}")
    assert [row.source for row in rows_of(str(path))] == [f"{path}:2", f"{path}:5"]
    table = tmp_path / "a.csv"
    table.write_text('prompt,completion\n"two\nlines",x\ny,z\n')
    assert [row.source for row in rows_of(str(table))] == [f"{table}:2", f"{table}:4"]


@pytest.mark.parametrize(
    ("fields", "prompt", "completion"),
    [
        (PAIR, "Where is my order?", "On its way."),
        ({"question": "q", "answer": "a"}, "q", "a"),
        ({"input": "q", "output": "a"}, "q", "a"),
        ({"query": "q", "response": "a", "id": 3}, "q", "a"),
        ({"Prompt": "q", "Completion": "a"}, "q", "a"),
        ({"instruction": "Sum", "input": "1 2", "output": "3"}, "Sum\n\n1 2", "3"),
        ({"instruction": "Sum", "input": "", "output": "3"}, "Sum", "3"),
        ({"instruction": "Sum", "context": "1 2", "response": "3"}, "Sum\n\n1 2", "3"),
        ({"prompt": [{"role": "user", "content": "q"}], "completion": "a"}, "q", "a"),
        ({"prompt": "q", "completion": [{"role": "assistant", "content": "a"}]}, "q", "a"),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, "q", "a"),
        ({"messages": json.dumps(TURNS[1:])}, "Hi", "Hello!"),
        ({"messages": [TURNS[1], {"role": "assistant", "content": [{"type": "text", "text": "a"}]}]}, "Hi", "a"),
    ],
)
def test_the_layout_is_found_from_the_columns(
    tmp_path: Path, fields: dict[str, object], prompt: str, completion: str
) -> None:
    row = conversation(write(tmp_path / "a.jsonl", fields))
    assert [(message.role, message.content) for message in row.messages] == [
        ("user", prompt),
        ("assistant", completion),
    ]


def test_messages_keep_system_tools_and_tool_calls(tmp_path: Path) -> None:
    call = {"function": {"name": "find", "arguments": '{"id": 1}'}}
    turns = [
        *TURNS[:2],
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "found"},
        TURNS[2],
    ]
    tool = {"type": "function", "function": {"name": "find"}}
    row = conversation(write(tmp_path / "a.jsonl", {"messages": turns, "tools": [tool], "team": "north"}))
    assert [message.role for message in row.messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert row.messages[2].tool_calls == (call,)
    assert row.tools == (tool,)
    assert row.extra == {"team": "north"}


def test_an_optional_column_may_start_in_a_later_row(tmp_path: Path) -> None:
    rows = rows_of(write(tmp_path / "a.jsonl", PAIR, {**PAIR, "system": "Be brief."}))
    assert [message.role for message in rows[1].prompt] == ["system", "user"]


def test_plain_text_is_a_conversation_without_messages(tmp_path: Path) -> None:
    row = conversation(write(tmp_path / "a.jsonl", {"text": "Once upon a time"}))
    assert (row.messages, row.text, row.completion) == ((), "Once upon a time", "Once upon a time")


def test_text_beside_a_label_asks_which_layout_is_meant(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", {"text": "great", "label": "positive"})
    with pytest.raises(DataError, match="prompt: text, completion: label"):
        rows_of(source)
    assert conversation(source, columns={"prompt": "text", "completion": "label"}).completion == "positive"
    assert conversation(source, layout="text").text == "great"


def test_preferences_become_comparisons(tmp_path: Path) -> None:
    plain = {"prompt": "q", "chosen": "good", "rejected": "bad", "rater": "ann"}
    whole = {"chosen": [*TURNS[:2], TURNS[2]], "rejected": [*TURNS[:2], {"role": "assistant", "content": "What?"}]}
    first = rows_of(write(tmp_path / "a.jsonl", plain))[0]
    second = rows_of(write(tmp_path / "b.jsonl", whole))[0]
    assert isinstance(first, Comparison)
    assert isinstance(second, Comparison)
    assert (first.chosen.content, first.rejected.content, first.rater) == ("good", "bad", "ann")
    assert [message.role for message in second.prompt] == ["system", "user"]
    assert second.rejected.content == "What?"


def test_prompts_alone_become_rows_with_an_answer_to_be_written(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", {"prompt": "q"}, {"prompt": "r", "system": "Be brief."})
    rows = rows_of(source)
    assert all(map(is_prompt_only, rows))
    assert [[message.role for message in row.prompt] for row in rows] == [["user"], ["system", "user"]]
    assert {row.completion for row in rows if isinstance(row, Conversation)} == {""}
    assert not is_prompt_only(conversation(write(tmp_path / "b.jsonl", PAIR)))


def test_other_columns_beside_a_prompt_alone_are_read_only_when_asked_for(tmp_path: Path) -> None:
    late = write(tmp_path / "a.jsonl", {"prompt": "q"}, PAIR)
    with pytest.raises(DataError, match="the first row has a prompt alone"):
        rows_of(late)
    with pytest.raises(DataError, match="cannot make rows"):
        rows_of(write(tmp_path / "b.jsonl", {"prompt": "q", "sum": 3}))
    assert [dict(row.extra) for row in rows_of(late, layout="prompt")] == [
        {"prompt_only": True},
        {"completion": PAIR["completion"], "prompt_only": True},
    ]


def test_columns_can_be_named_in_the_recipe(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", {"ticket": "q", "reply": "a"})
    with pytest.raises(DataError, match="'ticket', 'reply'"):
        rows_of(source)
    assert conversation(source, columns={"prompt": "ticket", "completion": "reply"}).completion == "a"
    with pytest.raises(DataError, match="no column 'tickets'"):
        rows_of(source, columns={"prompt": "tickets", "completion": "reply"})
    with pytest.raises(RecipeError, match="Did you mean 'prompt'"):
        rows_of(source, columns={"promt": "ticket"})


def test_columns_that_make_no_turn_are_named(tmp_path: Path) -> None:
    asked = {"system_prompt": "Be Ann.", "question": "q", "answer": "a"}
    source = write(tmp_path / "a.jsonl", PAIR, {**PAIR, "context": "Paris"})
    assert "not shown: 'system_prompt' (" in unread(rows_of(write(tmp_path / "b.jsonl", asked)))
    assert "not shown: 'context' (" in unread(rows_of(source))
    assert unread(rows_of(str(tmp_path / "b.jsonl"), columns={"system": "system_prompt"})) == ""
    assert unread(rows_of(write(tmp_path / "c.jsonl", {"prompt": "q"}))) == ""
    assert unread(rows_of("builtin:legal_citations", rows=3)) == ""  # of parts, which nobody wanted to be read


def test_the_row_limit_holds_for_train_only(tmp_path: Path) -> None:
    train = write(tmp_path / "train.jsonl", *[{**PAIR, "n": n} for n in range(5)])
    spec = DataSpec(train=train, rows=2, valid=0.1, test=0.1)
    valid = write(tmp_path / "valid.jsonl", *[PAIR] * 3)
    assert len(list(read(train, spec))) == 2
    assert len(list(read(valid, spec))) == 3


def test_limited_rows_are_drawn_from_the_whole_of_a_sorted_file(tmp_path: Path) -> None:
    labels = ["bad"] * 100 + ["good"] * 100
    train = write(tmp_path / "a.jsonl", *[{"prompt": f"q{n}", "completion": label} for n, label in enumerate(labels)])
    found = rows_of(train, rows=40)
    lines = [int(row.source.rpartition(":")[2]) for row in found]
    assert lines == sorted(set(lines))
    assert 10 < sum(line > 100 for line in lines) < 30
    assert rows_of(train, rows=40) == found
    assert {row.id for row in found} < {row.id for row in rows_of(train, rows=60)}
    assert {row.id for row in found} != {row.id for row in rows_of(train, rows=40, seed=1)}
    assert rows_of(train, rows=500) == rows_of(train)


def test_rows_added_to_a_file_move_few_of_those_that_are_drawn(tmp_path: Path) -> None:
    rows = [{"prompt": f"q{n}", "completion": "a"} for n in range(220)]
    few, more = write(tmp_path / "few.jsonl", *rows[:200]), write(tmp_path / "more.jsonl", *rows)
    before, after = ({row.id for row in rows_of(source, rows=50)} for source in (few, more))
    assert len(before & after) >= 40


def test_byte_order_mark_and_windows_line_ends_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(
        b"\xef\xbb\xbf" + json.dumps(PAIR).encode() + b"\r\n" + json.dumps(PAIR).encode()
    )
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbfprompt,completion\r\nq,a\r\n")
    assert len(rows_of(str(tmp_path / "a.jsonl"))) == 2
    assert conversation(str(tmp_path / "a.csv")).completion == "a"


def test_a_json_file_may_hold_one_object_per_line_or_a_list_under_a_key(tmp_path: Path) -> None:
    lines, nested = tmp_path / "a.json", tmp_path / "b.json"
    lines.write_text(f"{json.dumps(PAIR)}\n{json.dumps(PAIR)}\n")
    nested.write_text(json.dumps({"version": 1, "data": [PAIR, PAIR, PAIR]}))
    assert len(rows_of(str(lines))) == 2
    assert [row.source for row in rows_of(str(nested))] == [f"{nested}:1", f"{nested}:2", f"{nested}:3"]


@pytest.mark.parametrize(
    ("name", "content", "line", "says"),
    [
        ("a.jsonl", "", "", "empty"),
        ("a.jsonl", "\n \n", "", "no rows"),
        ("a.jsonl", '{"prompt": "q", "completion": "a"}\n{"prompt": "q"}', ":2", "no 'completion'"),
        ("a.jsonl", '\n{"prompt": "q", "completion": }', ":2", "not valid JSON at column 31"),
        ("a.json", '[{"prompt": "q",\n "completion": oops}]', ":2", "not valid JSON at column 16"),
        ("a.jsonl", '{"prompt": 3, "completion": "a"}', ":1", "'prompt' is a number"),
        ("a.jsonl", '{"prompt": "q", "completion": null}', ":1", "empty (null)"),
        ("a.jsonl", '{"prompt": "q", "prompt": "r", "completion": "a"}', ":1", "twice"),
        ("a.jsonl", '["prompt"]', ":1", "not an object"),
        ("a.jsonl", '{"messages": []}', ":1", "not a list of messages"),
        ("a.jsonl", '{"messages": [{"role": "user", "content": "q"}]}', ":1", "last message is from 'user'"),
        ("a.jsonl", '{"messages": [{"role": "wizard", "content": "q"}]}', ":1", "'wizard'"),
        ("a.jsonl", '{"messages": [{"role": "user", "content": [{"type": "image"}]}]}', ":1", "not text"),
        ("a.jsonl", '{"chosen": "a", "rejected": "b"}', ":1", "needs a prompt"),
        ("a.jsonl", '{"prompt": "\\ud800", "completion": "a"}', ":1", "surrogate"),
        ("a.jsonl", '{"prompt": "\\u0000", "completion": "a"}', ":1", "NUL"),
        ("a.jsonl", b'{"prompt": "\x00"}', ":1", "NUL"),
        ("a.jsonl", b'\n{"prompt": "\xff"}', ":2", "byte 13 of the line is not UTF-8"),
        ("a.jsonl", "x".encode("utf-16"), ":1", "UTF-16"),
        ("a.jsonl", '{"prompt": ' + "[" * 100 + "]" * 100 + "}", ":1", "nested"),
        ("a.jsonl", '{"prompt": ' + "[" * 100_000, ":1", "nested"),
        ("a.jsonl", '{"n": ' + "9" * 5000 + "}", ":1", "number"),
        ("a.csv", "prompt,prompt\nq,a", ":1", "twice"),
        ("a.csv", "prompt;completion\nq;a", ":1", "commas"),
        ("a.csv", "prompt,completion\nq,a\nq", ":3", "1 cells, the header 2"),
        ("a.csv", 'prompt,completion\n"q,a\n', ":2", "not valid CSV"),
        ("a.csv", "prompt,completion\n", "", "no rows"),
        ("a.parquet", b"PAR1 nonsense", ":1", "parquet"),
        ("a.jsonl.gz", b"\x1f\x8b\x08 nonsense", "", "gzip"),
        ("a.txt", "hello", "", "format"),
    ],
)
def test_a_defect_is_an_error_that_names_its_line(
    tmp_path: Path, name: str, content: bytes | str, line: str, says: str
) -> None:
    error = failure(tmp_path / name, content)
    assert error.where == f"{tmp_path / name}{line}"
    assert says in error.what


@pytest.mark.parametrize(
    ("name", "content", "line", "says", "fix"),
    [
        ("a.jsonl", '{\n "prompt": "q",\n "completion": "a"\n}\n', ":1", "over several lines", "jq -c"),
        ("a.jsonl", '[\n{"prompt": "q", "completion": "a"}\n]\n', ":1", "over several lines", ".json"),
        ("a.jsonl", '[{"prompt": "q", "completion": "a"}]', ":1", "not an object", "name it .json"),
        ("a.jsonl", "version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "", "Git LFS", "git lfs pull"),
        ("a.parquet", "version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "", "Git LFS", "git lfs pull"),
        ("a.jsonl", '{"prompt": "q", "completion": null}', ":1", "empty (null)", "leave the row out"),
        ("a.jsonl", '{"prompt": null, "completion": "a"}', ":1", "empty (null)", "leave the row out"),
    ],
)
def test_files_that_people_often_bring_are_told_what_to_do(
    tmp_path: Path, name: str, content: str, line: str, says: str, fix: str
) -> None:
    error = failure(tmp_path / name, content)
    assert error.where == f"{tmp_path / name}{line}"
    assert says in error.what
    assert fix in error.fix


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="no such file"):
        rows_of(str(tmp_path / "none.jsonl"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=f"Looked for {tmp_path}/none.jsonl"):
        rows_of("none.jsonl")
    with pytest.raises(DataError, match="is a folder"):
        rows_of(str(tmp_path))


def test_a_data_set_of_the_hub_layout_is_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "team" / "tickets").mkdir(parents=True)
    write(tmp_path / "team" / "tickets" / "train.jsonl", PAIR, PAIR)
    monkeypatch.chdir(tmp_path)
    assert [row.source for row in rows_of("team/tickets")] == ["team/tickets:1", "team/tickets:2"]
    assert [row.source for row in rows_of("team/tickets", rows=1)] == ["team/tickets:1"]  # the rest is not fetched
    with pytest.raises(DataError, match="hub"):
        rows_of("team/tickets:nosuchsplit")


def test_built_in_tasks_are_read_by_name() -> None:
    spec = DataSpec(train="builtin:legal_citations", rows=7)
    assert len(list(read(spec.train, spec))) == 7


SEEDS: dict[str, bytes] = {
    "pairs.jsonl": (json.dumps(PAIR) + "\n" + json.dumps({**PAIR, "extra": [1, {"a": None}]}) + "\n").encode(),
    "turns.jsonl": json.dumps({"messages": TURNS, "tools": [{"name": "find"}]}).encode(),
    "preferences.json": json.dumps([{"prompt": "q", "chosen": "a", "rejected": [TURNS[2]]}]).encode(),
    "pairs.csv": b'prompt,completion\n"a, ""b""",c\nd,"e\nf"\n',
}
JUNK = [
    b"\x00",
    b"\xff",
    b'"',
    b"{",
    b"[",
    b"]",
    b"}",
    b",",
    b"\\",
    b"\n",
    b"\r",
    b"\\ud800",
    b"null",
    b"1e999",
    b"[" * 3000,
]


@pytest.mark.parametrize("name", list(SEEDS))
@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_files_are_read_or_refused_but_never_crash(tmp_path: Path, name: str, data: st.DataObject) -> None:
    content = bytearray(SEEDS[name])
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, max(0, len(content) - 1)))
        match data.draw(st.sampled_from(["flip", "cut", "insert", "drop"])):
            case "flip" if content:
                content[place] ^= 1 << data.draw(st.integers(0, 7))
            case "cut":
                del content[place:]
            case "drop":
                del content[place : place + data.draw(st.integers(1, 8))]
            case _:
                content[place:place] = data.draw(st.sampled_from(JUNK))
    read_or_refused(tmp_path / name, bytes(content))


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    value=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
        max_leaves=8,
    ),
    name=st.sampled_from(["prompt", "completion", "messages", "chosen", "system", "tools", "text", "rater"]),
)
def test_any_value_in_any_column_is_read_or_refused(tmp_path: Path, value: object, name: str) -> None:
    for row in (
        PAIR,
        {"messages": TURNS},
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"messages": [value, value]},
    ):
        read_or_refused(tmp_path / "any.jsonl", json.dumps({**row, name: value}).encode())


def test_damaged_binary_files_are_read_or_refused(tmp_path: Path) -> None:
    table = tmp_path / "seed.parquet"
    pq.write_table(pa.Table.from_pylist([PAIR] * 3), table)
    draw = random.Random(0)
    for seed, name in ((table.read_bytes(), "a.parquet"), (gzip.compress(SEEDS["pairs.jsonl"]), "a.jsonl.gz")):
        for _ in range(60):
            content = bytearray(seed)
            content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
            read_or_refused(
                tmp_path / name, bytes(content if draw.random() < 0.5 else content[: draw.randrange(len(seed))])
            )


def read_or_refused(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    refusal = None
    try:
        rows_of(str(path))
    except TunesmithError as error:
        refusal = error
    assert refusal is None or (refusal.what and refusal.where and refusal.fix)


def test_items_ask_for_the_last_turn() -> None:
    spec = DataSpec(train="builtin:legal_citations", rows=3)
    rows = [row for row in read(spec.train, spec) if isinstance(row, Conversation)]
    found = items(rows)
    assert [item.reference for item in found] == [row.completion for row in rows]
    assert [item.prompt for item in found] == [row.messages[:1] for row in rows]
    assert [item.id for item in found] == [row.id for row in rows]


def test_the_reference_of_a_turn_that_only_calls_tools_is_its_calls(tmp_path: Path) -> None:
    call = {"name": "find", "arguments": {"id": 1}}
    turn = {"role": "assistant", "content": "", "tool_calls": [call]}
    row = conversation(write(tmp_path / "a.jsonl", {"messages": [TURNS[1], turn]}))
    assert json.loads(items([row])[0].reference) == [call]


@pytest.mark.parametrize("answer", [1, "1", "blue", "B", "b"])
def test_a_choice_is_named_by_index_text_or_letter(tmp_path: Path, answer: object) -> None:
    source = write(
        tmp_path / "a.jsonl", {"prompt": "q", "choices": ["red", "blue"], "answer": answer, "subject": "art"}
    )
    item = read_choices(source)[0]
    assert (item.reference, item.choices, item.extra) == ("blue", ("red", "blue"), {"subject": "art"})


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"prompt": "q", "answer": 0}, "multiple-choice"),
        ({"prompt": "q", "choices": ["a"], "answer": 0}, "two or more"),
        ({"prompt": "q", "choices": ["a", "b"], "answer": 2}, "none of the choices"),
        ({"prompt": "q", "choices": ["a", "b"], "answer": None}, "none of the choices"),
        ({"prompt": 1, "choices": ["a", "b"], "answer": 0}, "list of messages"),
    ],
)
def test_a_bad_choice_row_names_its_line(tmp_path: Path, fields: dict[str, object], says: str) -> None:
    source = write(tmp_path / "a.jsonl", fields)
    with pytest.raises(DataError, match=says) as caught:
        read_choices(source)
    assert caught.value.where == f"{source}:1"
