"""An HTTP server for bundles, with the interfaces of OpenAI and Anthropic. It needs starlette and uvicorn."""
