"""Answers of several models side by side: a page of one file, and a page where one types."""
