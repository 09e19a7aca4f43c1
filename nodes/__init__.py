"""What the user sees: schema, one call, output."""
