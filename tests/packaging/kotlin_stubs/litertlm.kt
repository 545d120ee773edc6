package com.google.ai.edge.litertlm

import kotlinx.coroutines.flow.Flow

data class EngineConfig(
    val modelPath: String,
    val maxNumTokens: Int? = null,
    val cacheDir: String? = null,
)

data class SamplerConfig(val topK: Int, val topP: Double, val temperature: Double, val seed: Int = 0)

data class ConversationConfig(val samplerConfig: SamplerConfig? = null)

class Message

class Conversation : AutoCloseable {
    fun sendMessageAsync(text: String): Flow<Message> = throw NotImplementedError()

    override fun close() = Unit
}

class Engine(val engineConfig: EngineConfig) : AutoCloseable {
    fun initialize() = Unit

    fun createConversation(config: ConversationConfig = ConversationConfig()): Conversation =
        throw NotImplementedError()

    override fun close() = Unit
}
