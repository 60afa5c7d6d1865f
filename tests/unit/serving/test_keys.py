"""Keys: made once, kept hashed, read again when their file changes."""

from __future__ import annotations

import hashlib
import logging
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml

from fmray import cli
from fmray.errors import ConfigError, RequestError
from fmray.serving import keys
from fmray.serving.keys import Access, Holder, KeyFile


@pytest.fixture
def file(tmp_path: Path) -> KeyFile:
    return KeyFile(tmp_path / "etc" / "keys.yaml")


def ask(access: Access, key: str) -> Holder:
    return access.holder([f"Bearer {key}"])


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is looked at before every request instead of once a second."""
    monkeypatch.setattr(keys, "LOOK_AGAIN", 0.0)


def test_a_key_is_told_once_and_kept_hashed(file: KeyFile) -> None:
    key = file.add("alice", requests=600)
    assert key.startswith("fmray-")
    assert len(key) == 6 + 43  # 256 bits
    text = file.path.read_text()
    assert key not in text
    assert key[6:] not in text
    entry = yaml.safe_load(text)["keys"]["alice"]
    assert entry["sha256"] == hashlib.sha256(key.encode()).hexdigest()
    assert (entry["requests_per_minute"], "inputs_per_minute" in entry) == (600, False)
    assert stat.S_IMODE(file.path.stat().st_mode) == 0o600
    assert ask(Access(file.path), key) == Holder("alice", 600, None)
    assert file.add("bob") != key
    assert [path.name for path in file.path.parent.iterdir() if path.suffix == ""] == []  # no scratch left


def test_keys_added_at_the_same_time_are_all_kept(file: KeyFile) -> None:
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda i: KeyFile(file.path).add(f"user{i}"), range(16)))
    access = Access(file.path)
    assert [ask(access, key).name for key in made] == [f"user{i}" for i in range(16)]


REFUSED: dict[str, tuple[list[str], str]] = {
    "nothing": ([], "missing_api_key"),
    "empty": ([""], "invalid_api_key"),
    "no scheme": (["{key}"], "invalid_api_key"),
    "another scheme": (["Basic {key}"], "invalid_api_key"),
    "no key": (["Bearer "], "invalid_api_key"),
    "another key": (["Bearer fmray-AAAA"], "invalid_api_key"),
    "cut short": (["Bearer {short}"], "invalid_api_key"),
    "with a tail": (["Bearer {key}x"], "invalid_api_key"),
    "in capitals": (["Bearer {upper}"], "invalid_api_key"),
    "its digest": (["Bearer {digest}"], "invalid_api_key"),
    "twice": (["Bearer {key}", "Bearer {key}"], "invalid_api_key"),
    "half a megabyte": (["Bearer " + "x" * 500_000], "invalid_api_key"),
    "other letters": (["Bearer \xe9\xff\x80"], "invalid_api_key"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_key(file: KeyFile, name: str) -> None:
    key = file.add("alice")
    given, code = REFUSED[name]
    facts = {"key": key, "short": key[:-1], "upper": key.upper(), "digest": keys.digest(key)}
    with pytest.raises(RequestError) as caught:
        Access(file.path).holder([line.format(**facts) for line in given])
    assert (caught.value.status, caught.value.code) == (401, code)
    assert key not in str(caught.value)


@pytest.mark.parametrize("line", ["Bearer {}", "bearer {}", "BEARER   {}", " Bearer {} "])
def test_what_is_one(file: KeyFile, line: str) -> None:
    key = file.add("alice")
    assert Access(file.path).holder([line.format(key)]).name == "alice"


def test_rotation_needs_no_restart(file: KeyFile, at_once: None) -> None:
    old = file.add("alice")
    access = Access(file.path)
    new = file.add("alice-2")
    assert ask(access, old).name == "alice"
    assert ask(access, new).name == "alice-2"
    file.remove("alice")
    with pytest.raises(RequestError):
        ask(access, old)
    assert ask(access, new).name == "alice-2"


def test_the_file_is_looked_at_once_a_second(file: KeyFile) -> None:
    access = Access(file.path) if file.add("alice") else None
    assert access is not None
    key = file.add("bob")
    with pytest.raises(RequestError):
        ask(access, key)
    access._looked -= keys.LOOK_AGAIN  # a second later
    assert ask(access, key).name == "bob"


@pytest.mark.parametrize("broken", ["{", "keys: [1]", "keys: {a: {sha256: short}}", "kees: {}", "\xff", None])
def test_a_broken_file_keeps_the_keys_and_is_told_once(
    file: KeyFile, at_once: None, caplog: pytest.LogCaptureFixture, broken: str | None
) -> None:
    key = file.add("alice")
    access = Access(file.path)
    if broken is None:
        file.path.unlink()
    else:
        file.path.write_bytes(broken.encode("latin-1"))
    with caplog.at_level(logging.DEBUG):
        assert [ask(access, key).name for _ in range(5)] == ["alice"] * 5
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert "\n" not in record.getMessage()
    file.path.unlink(missing_ok=True)
    other = file.add("bob")
    assert ask(access, other).name == "bob"  # mended, it is read again


def test_a_link_that_is_swapped_is_a_change(file: KeyFile, at_once: None) -> None:
    """As Kubernetes does it with a mounted secret."""
    key = file.add("alice")
    other = KeyFile(file.path.parent / "next.yaml")
    new = other.add("alice")
    link = file.path.parent / "current.yaml"
    link.symlink_to(file.path)
    access = Access(link)
    assert ask(access, key)
    swapped = file.path.parent / "swapped"
    swapped.symlink_to(other.path)
    os.replace(swapped, link)
    assert ask(access, new)
    with pytest.raises(RequestError):
        ask(access, key)


def test_an_endpoint_does_not_start_without_its_file(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"^access.key_file='.*none.yaml': cannot be read: No such file"
    ) as caught:
        Access(tmp_path / "none.yaml")
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------------ fmray keys


def test_the_command(file: KeyFile, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(file.path)
    assert cli.main(["keys", "add", "alice", "--file", path, "--requests-per-minute", "60"]) == 0
    key = capsys.readouterr().out.strip()
    assert ask(Access(path), key).requests_per_minute == 60
    assert cli.main(["keys", "list", "--file", path]) == 0
    out = capsys.readouterr().out
    assert "alice" in out
    assert "60 requests/min" in out
    assert key not in out
    assert keys.digest(key) not in out
    assert cli.main(["keys", "remove", "alice", "--file", path]) == 0
    assert KeyFile(path).read().keys == {}


WRONG: dict[str, tuple[list[str], str]] = {
    "no verb": ([], "error: keys='the following arguments are required: verb': --help shows how it is asked"),
    "no file": (
        ["add", "bob"],
        "error: keys='the following arguments are required: --file': --help shows how it is asked",
    ),
    "a name in use": (
        ["add", "alice", "--file", "{path}"],
        "error: keys add='alice': has a key in {path}; remove it, or take another name",
    ),
    "no name": (
        ["add", "a b", "--file", "{path}"],
        "error: keys add='a b': a name has letters, digits, '.', '_', '@', '-'; at most 64",
    ),
    "no such name": (
        ["remove", "bob", "--file", "{path}"],
        "error: keys remove='bob': no such key; there are: alice",
    ),
    "no such limit": (
        ["add", "bob", "--file", "{path}", "--inputs-per-minute", "0"],
        "error: keys add: inputs_per_minute=0: Input should be greater than or equal to 1",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_command_is_one_line(file: KeyFile, capsys: pytest.CaptureFixture[str], name: str) -> None:
    file.add("alice")
    words, line = WRONG[name]
    assert cli.main(["keys", *[word.format(path=file.path) for word in words]]) == 1
    assert capsys.readouterr().err == line.format(path=file.path) + "\n"
