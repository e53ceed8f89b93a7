"""Which model is in force, and the config file that remembers one."""

import json
import os
from pathlib import Path

import pytest

from gridprune_cli.config import (
    ModelChoice,
    choose_model,
    config_path,
    model_settings,
    remember_model,
    remember_settings,
)
from gridprune_cli.errors import BadInput, GridpruneError

NAMES = ("some/model", "some/model@v2", '/models/with "quotes" and \\ and Ünïcode', "a\tb")


def write(text: str | bytes) -> Path:
    path = config_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_option_before_variable_before_config_before_nothing(monkeypatch):
    assert choose_model() == ModelChoice(None, "default")
    path = write('model = "of/config"\n')
    assert choose_model() == ModelChoice("of/config", str(path))
    monkeypatch.setenv("GRIDPRUNE_MODEL", "")  # as if it were not set
    assert choose_model().origin == str(path)
    monkeypatch.setenv("GRIDPRUNE_MODEL", "of/variable")
    assert choose_model() == ModelChoice("of/variable", "GRIDPRUNE_MODEL")
    assert choose_model("of/variable") == ModelChoice("of/variable", "GRIDPRUNE_MODEL")
    assert choose_model("of/option") == ModelChoice("of/option", "model")


def test_where_the_file_lies(monkeypatch, tmp_path):
    assert config_path() == tmp_path / "config" / "gridprune" / "config.toml"
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for base in ("", "relative/folder"):
        monkeypatch.setenv("XDG_CONFIG_HOME", base)
        assert config_path() == tmp_path / "home" / ".config" / "gridprune" / "config.toml"
    monkeypatch.delenv("XDG_CONFIG_HOME")
    assert remember_model("a/b") == tmp_path / "home" / ".config" / "gridprune" / "config.toml"
    assert choose_model().model == "a/b"


@pytest.mark.parametrize("name", NAMES)
def test_a_name_comes_back_as_it_was_written(name):
    path = remember_model(name)
    assert choose_model() == ModelChoice(name, str(path))
    assert [entry.name for entry in path.parent.iterdir()] == ["config.toml"]
    remember_model(None)
    assert choose_model().model is None


def test_what_else_stands_in_the_file_stays(tmp_path):
    other = '# my own\nkeep = 0.2\n{}[table]\nmodel = "not this one"\n'
    path = write(other.format('model = "a/b" # so far\n'))
    remember_model("c/d")
    assert path.read_text() == other.format('model = "c/d"\n')
    remember_model(None)
    assert path.read_text() == other.format("") and choose_model().model is None


def test_a_key_is_not_put_into_a_table():
    path = write('[table]\nmodel = "not this one"\n')
    with pytest.raises(BadInput, match=f"{path}: its model can't be changed without harm"):
        remember_model("a/b")
    assert path.read_text() == '[table]\nmodel = "not this one"\n'
    path = write("[table]\nother = 1\n")
    remember_model("a/b")
    assert path.read_text() == 'model = "a/b"\n[table]\nother = 1\n'


def test_a_link_is_written_through(tmp_path):
    real = tmp_path / "dotfiles.toml"
    real.write_text("")
    config_path().parent.mkdir(parents=True)
    config_path().symlink_to(real)
    remember_model("a/b")
    assert config_path().is_symlink() and real.read_text() == 'model = "a/b"\n'


@pytest.mark.parametrize(
    ("text", "reason"),
    [("model = a/b\n", "no TOML"), (b"model = '\xff'\n", "no UTF-8"), ('model = "a"\nmodel = "b"\n', "no TOML")],
)
def test_a_broken_file_is_named_and_left_alone(text, reason):
    path = write(text)
    before = path.read_bytes()
    for call in (choose_model, lambda: remember_model("a/b"), lambda: remember_model(None)):
        with pytest.raises(BadInput, match=f"{path}: .*{reason}.*; mend it, or remove it"):
            call()
    assert path.read_bytes() == before
    assert choose_model("a/b").model == "a/b"  # for which it is not read


@pytest.mark.parametrize("value", ["3", '""', "[1]"])
def test_a_model_that_is_no_name_can_be_replaced(value):
    path = write(f"model = {value}\n")
    with pytest.raises(BadInput, match=f"{path}: model = .* names no model"):
        choose_model()
    remember_model("a/b")
    assert choose_model().model == "a/b"


def test_a_file_that_cannot_be_written_or_read(tmp_path, monkeypatch):
    write("").unlink()
    config_path().mkdir()
    with pytest.raises(BadInput, match=r"config.toml: can't be read \(Is a directory\)"):
        choose_model()
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "file"))
    (tmp_path / "file").write_text("")
    assert choose_model().model is None
    with pytest.raises(GridpruneError, match="can't be made"):
        remember_model("a/b")


@pytest.mark.parametrize(
    ("origin", "line"),
    [
        ("model", "model=a/b: no such model"),
        ("default", "model=a/b: no such model"),
        ("GRIDPRUNE_MODEL", "GRIDPRUNE_MODEL a/b: no such model"),
        ("/home/me/config.toml", "/home/me/config.toml: model a/b: no such model"),
    ],
)
def test_an_error_names_what_chose_the_model(origin, line):
    blamed = ModelChoice("a/b", origin).blame(BadInput("no such model", field="model", value="a/b"))
    assert str(blamed) == line and blamed.exit_code == 2
    other = GridpruneError("no such dtype", field="dtype", value="x")
    assert ModelChoice("a/b", origin).blame(other) is other


# ---- as commands -----------------------------------------------------------------------------------------------------


def test_ask_and_env_heed_the_config(command, tiny_llava, noise, tmp_path, monkeypatch):
    noise((60, 60)).image.save(tmp_path / "noise.png")
    asked = ("ask", tmp_path / "noise.png", "What is it?", "--json", "--max-new-tokens", 2)
    assert command(*asked)[0] == 2  # the embedded model knows no such thing
    path = write(f"model = {json.dumps(str(tiny_llava))}\n")
    code, out, _ = command(*asked)
    assert code == 0 and json.loads(out)["model"] == str(tiny_llava)
    model = json.loads(command("env", "--json")[1])["model"]
    assert model == {"value": str(tiny_llava), "from": str(path)}
    write('model = "no/such folder"\n')
    code, out, err = command(*asked)
    assert (code, out) == (2, "") and f"{path}: model no/such folder: no folder with" in err
    assert command(*asked, "--model", tiny_llava)[0] == 0
    write("model = \n")
    for arguments in (asked, ("env",), ("models", "default")):
        code, out, err = command(*arguments)
        assert (code, out) == (2, "") and err.count("\n") == 1 and f"{path}: no TOML" in err
    path.unlink()
    assert json.loads(command("env", "--json")[1])["model"] == {"value": "scenes", "from": "default"}
    monkeypatch.setenv("GRIDPRUNE_MODEL", str(tiny_llava))
    assert json.loads(command("env", "--json")[1])["model"]["from"] == "GRIDPRUNE_MODEL"
    assert os.listdir(tmp_path / "config" / "gridprune") == []


@pytest.mark.parametrize("key", NAMES)
def test_settings_of_a_model_come_back_as_they_were_written(key):
    settings = {"fingerprint": "ab" * 32, "relevance_depth": 12, "relevance_sign": -1}
    remember_model("some/model")
    path = remember_settings(key, settings)
    assert model_settings(key) == settings and choose_model().model == "some/model"
    remember_settings(key, {"relevance_depth": 3})
    assert model_settings(key) == {"relevance_depth": 3} and model_settings("another") == {}
    remember_settings(key, None)
    assert path.read_text() == 'model = "some/model"\n' and model_settings(key) == {}


def test_settings_of_other_models_stay_with_their_comments():
    other = '# mine\nmodel = "a/b"{}\n# of c\n[models."c/d"] # by hand\nrelevance_depth = 4 # tried\n'
    path = write(other.format('\n[models."a/b"]\nfingerprint = "x"\nrelevance_depth = 9'))
    remember_settings("a/b", {"relevance_depth": 1})
    assert path.read_text() == other.format('\n[models."a/b"]\nrelevance_depth = 1')
    remember_settings("a/b", None)
    assert path.read_text() == other.format("") and model_settings("c/d") == {"relevance_depth": 4}
    write('model = "a/b"')  # without an end of line
    remember_settings("a/b", {"relevance_depth": 1})
    assert choose_model().model == "a/b" and model_settings("a/b") == {"relevance_depth": 1}


@pytest.mark.parametrize("text", ["models = 3\n", '[models]\n"a/b" = 3\n', "[models.'a/b']\nrelevance_depth = 3\n"])
def test_settings_that_can_not_be_changed_safely_are_left_alone(text):
    path = write(text)
    with pytest.raises(BadInput, match=f"^{path}: its settings of a/b can't be changed without harm to the rest"):
        remember_settings("a/b", {"relevance_depth": 1})
    assert path.read_text() == text
    if "'" not in text:
        with pytest.raises(BadInput, match=f"^{path}: models holds no tables"):
            model_settings("a/b")
