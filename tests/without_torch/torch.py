"""Stands in the way of PyTorch where PYTHONPATH names this folder.

A process that a test starts is to have what an environment for runs has. tensorboardX imports
PyTorch where it finds it, which takes longer than a small run.
"""

raise ModuleNotFoundError("PyTorch is hidden from this process", name="torch")
