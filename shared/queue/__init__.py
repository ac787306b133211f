"""The queue runtime: receives messages, runs handlers, and decides what becomes of each message.

Theory of operation. SQS lends a message to whoever receives it, for its visibility timeout; who is done with it
deletes it, and who dies loses it to the next worker. It delivers at least once and out of order. So a handler may run
twice, also at the same time on two machines, and everything here is about making that rare and never losing anything.

The life of a message in this process:

    state      begins when                     and ends when
    ---------  ------------------------------  ----------------------------------------------------------------
    received   a poll returns it               its task starts; at a stop it is made visible at once
    running    its handler runs, in a slot     the handler ends; the table of `fates.py` says what comes next
    settling   the handler has ended           it is dead-lettered, sent on, or made visible again
    deleting   it is done with                 SQS took the delete; failures are repeated while the lease lasts
    lost       its lease ended, or SQS says    its handler is cancelled and told why; nothing is done to it any more
               that the handle is not valid

From received to deleting the message is held: one keeper extends the visibility of all held messages together. Its
deadlines count from before each call, so this process never believes in a lease that SQS has ended. Visibility is
changed by one call at a time: an extension that overtook a release would hide the message from everybody.

At a stop no new poll begins, and handlers get the grace period, are then cancelled, and their messages made visible.
The poll in flight is let finish, and its messages are returned at once: SQS would give a message to a poll that nobody
listens to any more, and hide it for a whole visibility timeout. For the same reason a message that is released while
that poll runs, which may have to be abandoned, stays hidden until the poll must have ended.

To write a service on it: `docs/queue.md`.

IAM: sqs:ReceiveMessage, sqs:DeleteMessage, sqs:ChangeMessageVisibility, sqs:GetQueueUrl, sqs:GetQueueAttributes and
sqs:SendMessage on the queue; sqs:SendMessage on its dead-letter queue and on the queues that handlers publish to. The
queue needs a redrive policy with a high maxReceiveCount (50): it is only the backstop.
"""

from shared.delivery import receive_count, remaining_s
from shared.queue.consumer import Handler, consume
from shared.queue.fates import Fate, fate_of
from shared.queue.publisher import Publish, Publisher

__all__ = ["Fate", "Handler", "Publish", "Publisher", "consume", "fate_of", "receive_count", "remaining_s"]
