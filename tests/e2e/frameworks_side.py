"""Runs in the frameworks' own environment: `python frameworks_side.py BASE_URL DATA_URL` prints what they were answered."""

import json
import sys

import openai
from langchain_core.messages import HumanMessage
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from llama_index.core.llms import ChatMessage, ImageBlock, TextBlock
from llama_index.embeddings.openai_like import OpenAILikeEmbedding
from llama_index.llms.openai_like import OpenAILike

BASE, PICTURE = sys.argv[1:]
TEXTS = ["a red heart", "blue"]
QUESTION = "what is it?"
told: dict[str, object] = {"openai": openai.__version__}

embeddings = OpenAIEmbeddings(
    model="fmray-clip", base_url=BASE, api_key="-", check_embedding_ctx_length=False
)
told["langchain embeddings"] = embeddings.embed_documents(TEXTS)
chat = ChatOpenAI(model="fmray-mllm", base_url=BASE, api_key="-", max_tokens=8, temperature=0)
question = HumanMessage(
    [{"type": "image_url", "image_url": {"url": PICTURE}}, {"type": "text", "text": QUESTION}]
)
told["langchain chat"] = chat.invoke([question]).content
told["langchain stream"] = "".join(str(chunk.content) for chunk in chat.stream([question]))

like = OpenAILikeEmbedding(model_name="fmray-clip", api_base=BASE, api_key="-")
told["llamaindex embeddings"] = like.get_text_embedding_batch(TEXTS)
llm = OpenAILike(
    model="fmray-mllm", api_base=BASE, api_key="-", is_chat_model=True, max_tokens=8, temperature=0
)
message = ChatMessage(role="user", blocks=[ImageBlock(url=PICTURE), TextBlock(text=QUESTION)])
told["llamaindex chat"] = llm.chat([message]).message.content
told["llamaindex stream"] = "".join(chunk.delta or "" for chunk in llm.stream_chat([message]))


class Letters:
    """Stands for OpenAI's tokenizer, which LangChain would fetch: ids are all that matters here."""

    def encode(self, text: str, **_options: object) -> list[int]:
        return list(text.encode())

    encode_ordinary = encode


import tiktoken  # noqa: E402

tiktoken.encoding_for_model = tiktoken.get_encoding = lambda *_: Letters()
try:
    OpenAIEmbeddings(model="fmray-clip", base_url=BASE, api_key="-").embed_documents(TEXTS)
except openai.BadRequestError as error:
    told["langchain ids"] = {"status": error.status_code, "message": error.message}
json.dump(told, sys.stdout)
