"""The finished model of a run, put on the Hub by rank 0."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dschat.errors import UserError
from dschat.settings import Settings, setting
from dschat.train import signals
from dschat.utils.addresses import check_repository
from dschat.utils.printable import printable

if TYPE_CHECKING:
    from dschat.models.save_plan import SavePlan


@dataclass(frozen=True)
class HubConfig(Settings):
    """Whether the finished model goes to the Hub, and who may read it there."""

    push_to_hub: str | None = setting(
        None,
        "OWNER/NAME on the Hub, which gets the finished model with its card; of step 3 the actor",
        may_change=True,
    )
    push_public: bool = setting(
        False, "let everybody read it there (default: a private repository)", may_change=True
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.push_to_hub is not None:
            check_repository(self.push_to_hub, "push_to_hub")

    def check(self) -> None:
        """Stop, before anything trains, where the Hub would ask who this is.

        Raises:
            UserError: with what to do.
        """
        if self.push_to_hub is not None:
            from dschat.models.hub_push import check_access

            try:
                check_access()
            except UserError as error:
                raise UserError(f"push_to_hub {self.push_to_hub}: {error}") from error

    def check_plan(self, plan: SavePlan, model_name: str) -> None:
        """Raise an error where an adapter alone would go there, whose base nobody else has.

        Raises:
            UserError: with the remedy.
        """
        if self.push_to_hub is not None and not plan.merged:
            from dschat.models.hub_push import check_base

            place = f"push_to_hub {self.push_to_hub}: the base of the adapter"
            check_base(model_name, place, "drop lora_save adapter")

    def push(self, folder: str | Path, rank: int) -> None:
        """Upload the model of a folder that is complete; what hinders it is said in one line.

        The run has ended well by then, and signals end the process as they do elsewhere.
        """
        if self.push_to_hub is None or rank != 0:
            return
        from dschat.models.hub_push import push

        signals.restore()
        print(f"{folder}: goes to {self.push_to_hub} on the Hub", flush=True)
        again = f"dschat push {folder} {self.push_to_hub}{' --public' * self.push_public}"
        try:
            said = push(folder, self.push_to_hub, self.push_public, "push_public")
        except (UserError, KeyboardInterrupt) as error:
            reason = "stopped" if isinstance(error, KeyboardInterrupt) else error
            said = f"not pushed: {reason}; the model is complete, and goes there by: {again}"
        print(printable(said, keep=""), flush=True)
