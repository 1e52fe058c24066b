"""The user's model, faster: which calls run programs, which programs are kept, and over which weights."""
