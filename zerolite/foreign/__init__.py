"""Configurations of other programs: what their keys mean, for commands and integrations."""
