"""The walk of a parameter through forward, backward and step."""
