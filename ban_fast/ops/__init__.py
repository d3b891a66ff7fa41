"""The losses as torch operators, one a file: schema, fake, backend call, public function."""
