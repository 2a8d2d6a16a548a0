"""What the report says, in words: on the screen, for GitHub, as a page, as a schema."""
