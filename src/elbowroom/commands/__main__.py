"""``python -m elbowroom.commands`` does what ``elbowroom`` does."""

from elbowroom.commands import main

main()
