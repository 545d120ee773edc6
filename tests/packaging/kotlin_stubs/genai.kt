package ai.onnxruntime.genai

class Model(path: String) : AutoCloseable {
    override fun close() = Unit
}

class Sequences {
    fun getSequence(index: Long): IntArray = throw NotImplementedError()
}

class TokenizerStream : AutoCloseable {
    fun decode(token: Int): String = throw NotImplementedError()

    override fun close() = Unit
}

class Tokenizer(model: Model) : AutoCloseable {
    fun encode(text: String): Sequences = throw NotImplementedError()

    fun createStream(): TokenizerStream = throw NotImplementedError()

    override fun close() = Unit
}

class GeneratorParams(model: Model) : AutoCloseable {
    fun setSearchOption(name: String, value: Double) = Unit

    fun setSearchOption(name: String, value: Boolean) = Unit

    override fun close() = Unit
}

class Generator(model: Model, params: GeneratorParams) : AutoCloseable {
    val isDone: Boolean get() = throw NotImplementedError()

    fun appendTokens(tokens: IntArray) = Unit

    fun generateNextToken() = Unit

    fun getLastTokenInSequence(sequence: Long): Int = throw NotImplementedError()

    override fun close() = Unit
}
