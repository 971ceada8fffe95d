"""A console that shows control characters of what others wrote, and keeps its own colours."""

from collections.abc import Iterable

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from megatron_kaiyuan.host.terminal import visible

__all__ = ["SafeConsole"]


class SafeConsole(Console):
    """rich's console, for text from documents, names and manifests."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Yield segments whose text is `visible`.

        Styles and the console's own control codes stay.
        """
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(visible(segment.text), segment.style)
