"""Conversations: their messages, the chat template that writes them, and the labels on the answers."""
