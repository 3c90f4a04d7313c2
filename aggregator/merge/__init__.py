"""The rules by which updates become one model."""
