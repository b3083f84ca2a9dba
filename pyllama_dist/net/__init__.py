"""What nodes say to each other. `PROTOCOL.md` in this folder is the specification."""
