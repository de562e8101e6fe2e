"""One reader for text files: UTF-8, lines that end at line feeds alone, rows by the ending."""

import json

import pytest

from data.prompts import normal, read_prompts, rows_of, texts_of


def prompts(file, content):
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return [row["prompt"] for row in read_prompts(str(file))]


@pytest.mark.parametrize(
    ("name", "content", "found"),
    [
        (
            "p.txt",
            "\ufefftwo red circles\r\n\r\n a blue  square \n",
            ["two red circles", "a blue  square"],
        ),
        (
            "p.txt",
            "two\u2028red\none\x85line\x0band\x1ca half",
            ["two\u2028red", "one\x85line\x0band\x1ca half"],
        ),
        ("p.txt", "cafe\u0301\n\u200b\n\ufeffa\n", ["caf\xe9", "a"]),
        (
            "p.jsonl",
            '\ufeff{"prompt": "two red\u2028circles"}\n\n{"prompt": " a "}\r\n',
            ["two red\u2028circles", "a"],
        ),
        ("p.JSONL", '{"prompt": "a"}\n"b"\n', ["a", "b"]),
        ("p.json", '[\n "two red circles",\n {"prompt": "one"}\n]\n', ["two red circles", "one"]),
        ("p.json", '{"prompt": "a"}', ["a"]),
        ("p.json", '{"prompt": "a"}\n{"prompt": "b"}\n', ["a", "b"]),
        (
            "p.csv",
            '\ufeffprompt, tag\r\n"red,\u2028and\nround",a\r\nNA,b\r\n\r\n007,c\r\n',
            ["red,\u2028and\nround", "NA", "007"],
        ),
        ("p.TSV", "tag\tprompt\na\tred, big\n", ["red, big"]),
    ],
)
def test_prompts_are_read_as_they_are_written(name, content, found, tmp_path):
    assert prompts(tmp_path / name, content) == found


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("p.txt", "two red circles\n".encode("utf-16"), "UTF-8.*Save it as UTF-8"),
        ("p.csv", "prompt\ncafé\n".encode("cp1252"), "UTF-8"),
        ("p.txt", "", "at least one prompt"),
        ("p.txt", "\ufeff\r\n \n", "at least one prompt"),
        ("p.json", "[]", "at least one prompt"),
        ("p.json", "[" * 10**5, "expected"),
        ("p.json", '["a",', "expected JSON"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": \n', "line 2: expected JSON"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": null}\n', "line 2: expected a prompt"),
        ("p.jsonl", '{"prompt": " "}\n', "expected a prompt"),
        ("p.jsonl", '{"prompt": "\\ud800"}\n', "expected a prompt"),
        ("p.jsonl", "[1]\n", "expected a prompt"),
        ("p.csv", "prompt,tag\n", "at least one prompt"),
        ("p.json", "1" * 5000, "expected JSON, got .*digits"),
        ("p.csv", "prompt;tag\nred, big;a\n", "expected ',' between.*looks like ';'.*Save it"),
        ("p.tsv", "prompt,tag\nred,a\n", "expected '.t' between.*looks like ','.*Save it"),
        ("p.csv", "sep=,\nprompt,tag\nred,a\n", "line 1: expected a header.*'sep=,'. Remove"),
        ("p.csv", "Prompt,tag\nred,a\n", "line 2: expected a prompt.*Its name is prompt, in sm"),
        ("p.csv", "", "a header"),
        ("p.csv", "prompt,prompt\na,b\n", "different names"),
        ("p.csv", "tag,text\na,b\n", "line 2: expected a prompt"),
        ("p.csv", "prompt,tag\nred, big,a\n", "line 2: expected 2 fields.*got 3.*double quotes"),
        ("p.csv", "prompt,tag\nred\n", "line 2: expected 2 fields.*got 1"),
        ("p.csv", 'prompt,tag\n"red,a\n', r"line 2: unexpected end of data"),
    ],
)
def test_what_is_no_prompt_is_refused_in_one_line(name, content, told, tmp_path):
    with pytest.raises(ValueError, match=rf"{name}.*{told}") as error:
        prompts(tmp_path / name, content)
    assert "\n" not in str(error.value)


def test_texts_of_a_cell_are_those_that_can_be_read():
    assert texts_of(" a\n") == texts_of(["", "a", None, "\ufeff"]) == ["a"]
    for cell in ("", " \n", "\ufeff", "\u200b", None, [], ["", " "], [None], 7, {"en": "a"}):
        with pytest.raises(ValueError, match="expected a text"):
            texts_of(cell)
    assert normal("a\u0308 \u2028b ") == "\xe4 \u2028b"


@pytest.mark.parametrize("unseen", ["\u2060", "\u200e", "\xad", "\u200c", "\u200d", "\u061c"])
def test_what_cannot_be_seen_is_no_text(unseen):
    assert normal(unseen) == normal(f" {unseen}\ufeff{unseen}") == ""
    assert normal(f"{unseen} a{unseen}b{unseen}\n") == f"a{unseen}b"


@pytest.mark.parametrize(
    "text",
    [
        "\U0001f469\u200d\U0001f680",  # an astronaut
        "\U0001f3f4\U000e0067\U000e0062\U000e007f",  # a flag, of tags
        "\u0d28\u0d4d\u200d",  # a letter of Malayalam that ends in a joiner
        "\u06dd",  # a sign of Arabic that is seen, though a mark of format
    ],
)
def test_marks_that_are_part_of_a_character_stay(text):
    assert normal(f"\u200e{text}\u200e ") == text


def test_rows_say_where_they_are(tmp_path):
    file = tmp_path / "a.csv"
    file.write_text('a,b\n"x\ny",1\nz,2\n')
    where = [one.partition("a.csv")[2] for one, _ in rows_of(file)]
    assert where == [", line 3", ", line 4"]
    file = tmp_path / "a.json"
    file.write_text(json.dumps({"images": []}))
    assert [row for _, row in rows_of(file)] == [{"images": []}]
