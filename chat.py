"""Talk to a trained model folder: `python chat.py --path DIR`; see inference/chatbot.py."""

import runpy

if __name__ == "__main__":
    runpy.run_module("inference.chatbot", run_name="__main__")
