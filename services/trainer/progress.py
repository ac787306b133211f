"""How far the current round has come: `progress.json`, for people who watch. Nothing else reads it."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from services.trainer.jsconfig import checked_config
from services.trainer.protocol import Losses, News
from services.trainer.run import Run
from shared.documents.training import StoredPlan, StoredProgress
from shared.errors import Unavailable
from shared.idempotency import store


@asynccontextmanager
async def shown(run: Run, plan: StoredPlan) -> AsyncIterator[Callable[[News], None]]:
    """Yield a function that takes the training process's news; the newest losses are stored while the block runs.

    The training process reports every few seconds, so the record is written no more often than that.
    """
    config = checked_config(plan.config)
    news: asyncio.Queue[Losses] = asyncio.Queue()

    def hear(told: News) -> None:
        if isinstance(told, Losses):
            news.put_nowait(told)

    async def keep() -> None:
        while True:
            losses = await news.get()
            while not news.empty():
                losses = news.get_nowait()
            progress = StoredProgress(
                round=plan.round,
                step=losses.step - plan.until + config.steps,
                of_steps=config.steps,
                images_seen=losses.step * config.batch_size,
                generator_loss=losses.generator_loss,
                discriminator_loss=losses.discriminator_loss,
                time=run.ports.clock(),
            )
            with contextlib.suppress(Unavailable):
                await store(run.keys.progress, progress, objects=run.ports.objects)

    keeping = asyncio.create_task(keep())
    try:
        yield hear
    finally:
        keeping.cancel()
        await asyncio.gather(keeping, return_exceptions=True)
