"""The validator beside libunbound and delv, over generated answers: `python -m tests.differential`."""
