"""The documentation as a site: what `make docs` needs beside the pages."""
