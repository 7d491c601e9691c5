import pytest

from stagewise.chat import registry
from stagewise.chat.template import Template
from template import TEMPLATES


def test_the_table_of_template_py_is_registered():
    assert dict(registry.templates_by_name()) == TEMPLATES


def test_two_templates_of_one_name_are_an_error(monkeypatch):
    monkeypatch.setattr(registry, "_TEMPLATES", {})
    one = Template("mine", user="Q: {content}", lead=" A:")
    registry.register([one, one])
    with pytest.raises(ValueError, match="two templates are named 'mine'"):
        registry.register([Template("mine", user="U: {content}", lead=" A:")])


def test_without_template_py_the_error_names_it(monkeypatch):
    monkeypatch.setattr(registry, "_TEMPLATES", {})
    with pytest.raises(RuntimeError, match="import template"):
        registry.templates_by_name()
