"""Conversations: their messages, the chat template that renders them, and the labels on the assistant's answers."""
