"""Modules that the scripts need. The method can be understood without reading them."""
