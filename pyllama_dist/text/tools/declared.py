"""The tools that a request declares."""

from collections.abc import Iterator, Mapping, Sequence

from pyllama_dist.text.tools.schema import ANY, Types, argument_types


class DeclaredTools:
    """Names of tools, and the types of their arguments."""

    def __init__(self, tools: Sequence[Mapping[str, object]]) -> None:
        """`tools` as in OpenAI's API: with a `function`, or functions themselves.

        What is no tool is left out: who takes the request checks it.
        """
        self._parameters: dict[str, object] = {}
        for tool in tools:
            match tool.get("function", tool):
                case {"name": str(name), **rest} if name:
                    self._parameters[name] = rest.get("parameters")

    def __contains__(self, name: str) -> bool:
        return name in self._parameters

    def __iter__(self) -> Iterator[str]:
        return iter(self._parameters)

    def types(self, tool: str, argument: str) -> Types:
        """The types that an argument may have; all of them where nothing is known."""
        if tool not in self._parameters:
            return ANY
        return argument_types(self._parameters[tool], argument)
