"""SparK's attention backend for SGLang."""
