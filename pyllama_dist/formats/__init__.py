"""Files of models: a room for each family of formats, and the way from one to another."""
