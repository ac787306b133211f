"""What others import: `radqueue.queue`, the queue runtime, and `radqueue.pipeline`, functions for notebooks."""
