"""OpenAI's ``/v1/responses``, for text. Nothing is kept: each request brings the whole conversation."""

from __future__ import annotations

from typing import Any

from starlette.responses import Response

from edgellm_runtime.server.answering import completed, streamed
from edgellm_runtime.server.asking import ask
from edgellm_runtime.server.call import Call, JsonText
from edgellm_runtime.server.fields import Fields
from edgellm_runtime.server.forms import grammar_for, wanted_schema
from edgellm_runtime.server.host import Hosted
from edgellm_runtime.server.parts import Sorting, chat_prompt, thinking_variables
from edgellm_runtime.server.response_maker import ResponseMaker
from edgellm_runtime.server.responses_fields import input_messages
from edgellm_runtime.server.sampling_fields import common_options
from edgellm_runtime.server.tools import responses_tools

__all__ = ["responses"]


async def responses(call: Call) -> Response:
    """Answer an input: a text, or the items of a conversation."""
    fields = call.fields
    hosted = call.host.find(fields.need("model"))
    call.model = hosted.name
    _refuse(fields)
    options = common_options(fields, hosted, highest=2.0)
    most = fields.integer("max_output_tokens", 1, 2**31 - 1)
    options["max_new_tokens"] = most or hosted.scheduler.context
    instructions, given, variables = fields.text("instructions"), input_messages(fields), _variables(fields, hosted)
    if instructions is not None:
        given = [{"role": "system", "content": instructions}, *given]
    stream, tools, schema = fields.flag("stream"), responses_tools(fields), _schema(fields)
    fields.done()
    schema = tools.schema if tools.required else schema
    form = schema is not None
    if form:
        options["grammar"] = await grammar_for(hosted, schema)
    sorting = Sorting(hosted, tools, form=form)
    asked = await ask(hosted, lambda: chat_prompt(hosted, given, tools, variables or None, form=form),
                      timeout=call.options.timeout, options={**options, **sorting.options})  # fmt: skip
    call.asked.append(asked)
    made = ResponseMaker(asked, sorting, hosted.name, fields)
    if stream:
        return streamed(call, made.events(call))
    (answer,) = await completed(call)
    return JsonText(made.whole(answer))


def _variables(fields: Fields, hosted: Hosted) -> dict[str, Any]:
    """What the template is told of how much to think."""
    own = fields.object("reasoning")
    if own is None:
        return {}
    own.ignore("summary", "generate_summary")  # the thinking itself comes
    found = thinking_variables(own, "effort", own.get("effort"), hosted)
    own.done()
    return found


def _schema(fields: Fields) -> Any:
    """The JSON schema that the answer is to be of; None: it is a text."""
    text = fields.object("text")
    if text is None:
        return None
    schema = wanted_schema(text.object("format"), "text.format")
    text.refuse(verbosity=())
    text.done()
    return schema


def _refuse(fields: Fields) -> None:
    fields.refuse(
        previous_response_id=(), conversation=(), background=(False,), include=([], ["reasoning.encrypted_content"]),
        prompt=(), max_tool_calls=(), truncation=("disabled",), top_logprobs=(0,),
    )  # fmt: skip
    fields.ignore(
        "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key",
        "prompt_cache_retention", "stream_options",
    )  # fmt: skip
