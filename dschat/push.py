"""Put a finished model, with its card, on the Hub: in a private repository, or a public one.

    dschat push output/step3-models/actor me/my-chat-model
    dschat push output/adapter me/my-adapter --public

Only the model's own files go: no metrics, no checkpoints, no report. The card names the data and
holds the settings; read it before you make a model public.
"""

from __future__ import annotations

from collections.abc import Sequence

from dschat.config.cli import run_cli
from dschat.config.help import OneLineParser, program
from dschat.utils.printable import printable


def main(argv: Sequence[str] | None = None) -> None:
    """Check, then upload."""
    parser = OneLineParser(__doc__, prog=program("dschat.push"))
    parser.add_argument("folder", help="of a finished model, or an adapter")
    parser.add_argument("repository", help="OWNER/NAME on the Hub")
    parser.add_argument("--public", action="store_true", help="let everybody read it")
    words = parser.parse_args(argv)

    from dschat.models.hub_push import check_access, check_finished, push
    from dschat.utils.addresses import check_repository

    check_repository(words.repository, "repository")
    check_finished(words.folder)
    check_access()
    print(printable(push(words.folder, words.repository, words.public)))


if __name__ == "__main__":
    run_cli(main)
