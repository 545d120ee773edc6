package kotlinx.coroutines.flow

import kotlin.coroutines.CoroutineContext

fun interface FlowCollector<in T> {
    suspend fun emit(value: T)
}

interface Flow<out T> {
    suspend fun collect(collector: FlowCollector<T>)
}

fun <T> flow(block: suspend FlowCollector<T>.() -> Unit): Flow<T> = throw NotImplementedError()

fun <T> Flow<T>.flowOn(context: CoroutineContext): Flow<T> = throw NotImplementedError()

inline fun <T, R> Flow<T>.map(crossinline transform: suspend (value: T) -> R): Flow<R> =
    throw NotImplementedError()

suspend inline fun <T, R> Flow<T>.fold(initial: R, crossinline operation: suspend (acc: R, value: T) -> R): R =
    throw NotImplementedError()
