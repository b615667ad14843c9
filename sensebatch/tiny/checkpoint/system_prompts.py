"""The system prompts that this checkpoint was trained with."""

SYSTEM_MESSAGE_FOR_GEN = "You draw and edit pictures."
DEFAULT_SYSTEM_MESSAGE = "You answer with words and pictures."
