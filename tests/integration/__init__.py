"""Trainers of others, each in its environment; a process that imports this has a torchvision that works."""

from integration.on_cpu import import_torchvision

import_torchvision()
