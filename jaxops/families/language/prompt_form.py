"""How a language model's run turns prompts into tokens, by the data that it learnt from."""

from typing import Any

from jaxops.data.preferences.spec import PreferenceData, RatingData
from jaxops.data.prompts.writer import PromptForm
from jaxops.data.text.spec import ChatData, Templated, conversations_of, sources_of
from jaxops.run.saved_run import SavedRun


def written_as(data: Any) -> Templated:
    """Returns how the conversations of a data section become text."""
    if isinstance(data, PreferenceData):
        return ChatData(path="", template=data.template, arguments=data.arguments, date=data.date)
    return ChatData(path="") if isinstance(data, RatingData) else conversations_of(data)


def prompt_form(saved: SavedRun) -> PromptForm:
    """Returns how `sample` and `chat` turn prompts into tokens, as the run's own data were turned into tokens.

    Whether pairs were conversations their data section does not tell, but what the run noted of its data.
    """
    data = saved.config.data
    if isinstance(data, PreferenceData | RatingData):
        chats = bool(saved.folder.read_json("data.json").get("conversations"))
    else:
        chats = any(isinstance(one, ChatData) for one in sources_of(data))
    form = written_as(data)
    return PromptForm(chats=chats, arguments=form.arguments, date=form.date)
