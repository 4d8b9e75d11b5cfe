"""Other people's trainers on zerolite's engine: a module each, imported by the user, none by `import zerolite`."""
