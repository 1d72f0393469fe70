"""Talk to a trained model folder: `python chat.py --path DIR`; see inference/chatbot.py."""

from dschat.config.cli import run_cli
from inference.chatbot import main

if __name__ == "__main__":
    run_cli(main)
